"""Compares the head's forms, chunk sizes and kernels with each other and with three plain products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalign.ops.head_blocks import HeadConfig
from megalign.ops.linear_logp import linear_logp, weighted_logp
from megalign.ops.vocab import VocabShard
from tests.gpu.first_hour_parts.device import CUDA, clock_problem, memory_problem, peak_bytes, relative, take_turns
from tests.gpu.first_hour_parts.report import Report

FORMS = ("recompute", "own lse", "given lse")
# Times over three products, as estimated from the sizes of what is read and written (of an H100).
LIMITS = {
    "torch": {"recompute": 2.1, "own lse": 1.5, "given lse": 1.45},
    "compiled": {"recompute": 1.5, "own lse": 1.3, "given lse": 1.1},
}
Sizes = tuple[int, int, int]  # tokens, hidden, vocabulary


class Inputs:
    """Holds the operands of all forms, and the log-sum-exps of an earlier pass."""

    def __init__(self, sizes: Sizes) -> None:
        tokens, hidden, vocabulary = sizes
        torch.manual_seed(0)
        half = torch.bfloat16
        self.hidden_TH = torch.randn(tokens, hidden).to(half).to(CUDA).requires_grad_()
        # Drawn on the device: half a billion numbers take long on a CPU.
        weight_VH = torch.randn(vocabulary, hidden, device=CUDA).mul_(hidden**-0.5).to(half)
        self.weight_VH = weight_VH.requires_grad_()
        self.target_T = torch.randint(vocabulary, (tokens,)).to(CUDA)
        self.coefficient_T = torch.randn(tokens).to(CUDA)
        self.shard = VocabShard(0, vocabulary, vocabulary)
        with torch.no_grad():
            found = linear_logp(self.hidden_TH, self.weight_VH, self.target_T, self.shard)
        self.logp_T, self.lse_T = found.logp_N, found.lse_N


def run_form(form: str, inputs: Inputs, cfg: HeadConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Run a form forward and backward; return (log-probs, gradient of hidden states, of the weight)."""
    one = inputs
    one.hidden_TH.grad = one.weight_VH.grad = None
    if form == "recompute":
        found = linear_logp(one.hidden_TH, one.weight_VH, one.target_T, one.shard, cfg=cfg)
        value = (found.logp_N * one.coefficient_T).sum()
    else:
        lse_T = one.lse_T if form == "given lse" else None
        arguments = (one.hidden_TH, one.weight_VH, one.target_T, one.coefficient_T, one.shard)
        value, found = weighted_logp(*arguments, lse_N=lse_T, cfg=cfg)
    value.backward()
    assert one.hidden_TH.grad is not None and one.weight_VH.grad is not None
    return found.logp_N, one.hidden_TH.grad, one.weight_VH.grad


def three_products(inputs: Inputs) -> None:
    """Multiply as any head must: logits, and the gradients of hidden states and weight, in bf16."""
    hidden_TH, weight_VH = inputs.hidden_TH.detach(), inputs.weight_VH.detach()
    logits_TV = hidden_TH @ weight_VH.t()
    torch.mm(logits_TV, weight_VH)
    torch.mm(logits_TV.t(), hidden_TH)


def kernels(report: Report) -> dict[str, dict[str, Any]]:
    """Return the arguments of HeadConfig of each `engine.head_kernel`; those that are missing are noted."""
    found: dict[str, dict[str, Any]] = {"torch": {}}
    try:
        from megalign.ops.block_passes import choose_passes
        from megalign.schema import UserError
    except ModuleNotFoundError:
        report.skip("compiled", "this version has no engine.head_kernel")
        return found
    try:
        found["compiled"] = {"compiled": choose_passes("compiled", CUDA)}
    except UserError as error:
        report.skip("compiled", str(error))
    return found


def head(report: Report) -> None:
    """Check that all forms agree, then time them."""
    sizes: Sizes = (80, 32, 256) if report.small else (8192, 4096, 128256)
    chunk_sizes = (None, 16, 64) if report.small else (None, 1024, 2048, 4096, 8192)
    inputs = Inputs(sizes)
    right = [each.clone() for each in run_form("recompute", inputs, HeadConfig())]
    ways: dict[str, Callable[[], object]] = {"three products": partial(three_products, inputs)}
    for kernel, arguments in kernels(report).items():
        for form in FORMS:
            off = 0.0
            for chunk in chunk_sizes:
                way = partial(run_form, form, inputs, HeadConfig(chunk_tokens=chunk, **arguments))
                found = way()
                off = max(off, *(relative(a, b) for a, b in zip(found, right, strict=True)))
                ways[f"{kernel}, {form}, {chunk or 'default'}"] = way
            report.within(f"{kernel}, {form}: log-probs and gradients off recompute's by", off, 1e-2)
        passes = arguments.get("compiled")
        if passes is not None:
            report.check(
                "the compiler works", not passes.failed, expected="yes", found="no" if passes.failed else "yes"
            )
    time_ways(report, ways)
    if memory_problem() is None:
        for form in FORMS:
            held = peak_bytes(partial(run_form, form, inputs, HeadConfig()))
            logits = 4 * sizes[0] * sizes[2]
            report.figure(f"torch, {form}: GB held, both gradients among them", round(held / 1e9, 2))
            report.figure("logits of all tokens in fp32: GB", round(logits / 1e9, 2))


def time_ways(report: Report, ways: dict[str, Callable[[], object]]) -> None:
    """Note every way's time over three products; the defaults are held to their limits."""
    problem = clock_problem()
    if problem is not None:
        report.skip("times", problem)
        return
    times = take_turns(ways, rounds=2 if report.small else 7)
    products = times.pop("three products")
    report.figure("three products: ms", round(products, 2))
    for name, took in times.items():
        kernel, form, chunk = name.split(", ")
        if chunk == "default" and not report.small:
            report.within(f"{name}: times three products", took / products, LIMITS[kernel][form])
        else:
            report.figure(f"{name}: times three products", round(took / products, 2))
