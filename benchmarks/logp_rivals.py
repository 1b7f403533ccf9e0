"""Implements the contestants of `benchmarks.logp`: this project's log-prob head, plain torch's and other libraries'.

Axes: T tokens, H hidden, V this rank's vocabulary rows, C tokens of a chunk. Every contestant computes
loss = sum(coefficient x log-prob), and stores dH (summed over the ranks) in `hidden_TH.grad` and dW in `weight_VH.grad`
or, where supported, in `weight_VH.main_grad`.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from torch import Tensor
from torch.nn import functional as F

from megalign.engines.megatron.groups import Groups
from megalign.ops.head_blocks import HeadConfig
from megalign.ops.linear_logp import linear_logp, weighted_logp
from megalign.ops.vocab import VocabShard
from megalign.ops.weight_grad import main_grad_sink

LIMIT = "(a) three matrix products"
CHUNK = 512  # tokens per chunk in contestant (d)
OTHERS = ("(b)", "(c)", "(d)", "(e)")


@dataclass(frozen=True)
class Inputs:
    """Holds one rank's inputs of a case."""

    hidden_TH: Tensor
    weight_VH: Tensor
    target_T: Tensor
    coefficient_T: Tensor
    lse_T: Tensor
    true_grad_TH: Tensor  # dH computed in fp32 from the same inputs
    shard: VocabShard
    groups: Groups


# Computes the loss (returned detached) and stores the gradients in the inputs.
Way = Callable[[Inputs], Tensor]


def ways(inputs: Inputs) -> dict[str, Way | str]:
    """Return {name: contestant, or the reason why it cannot run here}."""
    contestants: dict[str, Way | str] = {LIMIT: ThreeProducts(inputs)}
    low_precision = inputs.hidden_TH.dtype == torch.bfloat16
    for suffix, low_precision_grad in (
        ((", fp32 gradient", False), (", bf16 gradient", True)) if low_precision else (("", None),)
    ):
        cfg = HeadConfig(low_precision_grad=low_precision_grad)
        contestants |= {
            f"ours, given lse{suffix}": partial(given_lse, cfg=cfg),
            f"ours, known coefficients{suffix}": partial(known_coefficients, cfg=cfg),
            f"ours, recompute{suffix}": partial(recompute, cfg=cfg),
        }
    one_rank = inputs.groups.tensor_size == 1
    contestants["(b) log_softmax + gather" + ("" if one_rank else " of gathered logits")] = plain
    contestants["(c) Megatron-Core, unfused"] = partial(on_logits, logp=megatron_unfused)
    contestants["(c) Megatron-Core, fused"] = _with_compiler(partial(on_logits, logp=megatron_fused))
    contestants["(d) chunks, recompute without lse"] = chunked
    if importlib.util.find_spec("cut_cross_entropy") is None:
        contestants["(e) cut-cross-entropy, torch path"] = "not installed"
    else:
        contestants["(e) cut-cross-entropy, torch path"] = (
            _with_compiler(cut_cross_entropy) if one_rank else "has no tensor parallelism"
        )
    return contestants


def _with_compiler(way: Way) -> Way | str:
    return way if shutil.which("g++") else "skipped: torch.compile needs g++, which is not here"


class ThreeProducts:
    """Computes only the three matrix products for logits, dH and dW, into preallocated memory: the limit."""

    def __init__(self, inputs: Inputs) -> None:
        hidden_TH, weight_VH = inputs.hidden_TH.detach(), inputs.weight_VH.detach()
        # Touched here, because the first use of new memory costs as much as an elementwise pass.
        self.logits_TV = hidden_TH.new_zeros(len(hidden_TH), len(weight_VH))
        self.grad_TH, self.grad_VH = torch.zeros_like(hidden_TH), torch.zeros_like(weight_VH)

    def __call__(self, inputs: Inputs) -> Tensor:
        hidden_TH, weight_VH = inputs.hidden_TH.detach(), inputs.weight_VH.detach()
        torch.mm(hidden_TH, weight_VH.t(), out=self.logits_TV)
        torch.mm(self.logits_TV, weight_VH, out=self.grad_TH)  # any values serve as the logits' gradient
        torch.mm(self.logits_TV.t(), hidden_TH, out=self.grad_VH)
        return torch.zeros(())


def given_lse(inputs: Inputs, *, cfg: HeadConfig) -> Tensor:
    """Run pass 2 of a two-pass step; the loss is summed over ranks, which training does not need."""
    value, _ = weighted_logp(
        inputs.hidden_TH,
        inputs.weight_VH,
        inputs.target_T,
        inputs.coefficient_T,
        inputs.shard,
        lse_N=inputs.lse_T,
        cfg=cfg,
        sink=main_grad_sink(inputs.weight_VH),
    )
    value.backward()
    if inputs.groups.tensor_size == 1:
        return value.detach()
    whole = value.detach() + (inputs.coefficient_T * inputs.lse_T).sum()
    dist.all_reduce(whole, group=inputs.groups.tensor)
    return whole - (inputs.coefficient_T * inputs.lse_T).sum()


def known_coefficients(inputs: Inputs, *, cfg: HeadConfig) -> Tensor:
    """Run a step as in SFT: coefficients are known before the log-probs, the log-sum-exp is not."""
    sink = main_grad_sink(inputs.weight_VH)
    value, _ = weighted_logp(
        inputs.hidden_TH, inputs.weight_VH, inputs.target_T, inputs.coefficient_T, inputs.shard, cfg=cfg, sink=sink
    )
    value.backward()
    return value.detach()


def recompute(inputs: Inputs, *, cfg: HeadConfig) -> Tensor:
    """Differentiate through the log-probs, for any loss; backward recomputes the logits."""
    sink = main_grad_sink(inputs.weight_VH)
    result = linear_logp(inputs.hidden_TH, inputs.weight_VH, inputs.target_T, inputs.shard, cfg=cfg, sink=sink)
    return _backward(result.logp_N, inputs)


def _backward(logp_T: Tensor, inputs: Inputs) -> Tensor:
    loss = (logp_T * inputs.coefficient_T).sum()
    loss.backward()
    return loss.detach()


def _logits(inputs: Inputs) -> Tensor:
    """Compute column-parallel logits, whose backward all-reduces dH."""
    hidden_TH = tensor_parallel.copy_to_tensor_model_parallel_region(inputs.hidden_TH)
    return hidden_TH @ inputs.weight_VH.t()


def plain(inputs: Inputs) -> Tensor:
    """Compute log_softmax and gather, the naive version; no variable keeps logits that autograd does not."""

    def logp(logits_TV: Tensor, inputs: Inputs) -> Tensor:
        logits_TV = tensor_parallel.gather_from_tensor_model_parallel_region(logits_TV)
        return F.log_softmax(logits_TV.float(), dim=-1).gather(1, inputs.target_T[:, None]).squeeze(1)

    return on_logits(inputs, logp=logp)


def on_logits(inputs: Inputs, *, logp: Callable[[Tensor, Inputs], Tensor]) -> Tensor:
    """Compute the loss with another library's function of this rank's logits."""
    return _backward(logp(_logits(inputs), inputs), inputs)


def megatron_unfused(logits_TV: Tensor, inputs: Inputs) -> Tensor:
    """Compute log-probs with Megatron's vocab-parallel cross-entropy: three all-reduces in forward."""
    return -tensor_parallel.vocab_parallel_cross_entropy(logits_TV, inputs.target_T)


def megatron_fused(logits_TV: Tensor, inputs: Inputs) -> Tensor:
    """Compute log-probs with Megatron's fused cross-entropy: two all-reduces in forward, bfloat16 gradient always."""
    return -fused_vocab_parallel_cross_entropy(logits_TV, inputs.target_T, inputs.groups.tensor)


def cut_cross_entropy(inputs: Inputs) -> Tensor:
    """Run cut-cross-entropy's path without Triton kernels: compiled product and cross-entropy."""
    from cut_cross_entropy import linear_cross_entropy

    nll_T = linear_cross_entropy(
        inputs.hidden_TH, inputs.weight_VH, inputs.target_T, impl="torch_compile", reduction="none"
    )
    return _backward(-nll_T, inputs)


def chunked(inputs: Inputs) -> Tensor:
    """Compute log-probs in chunks of tokens; backward recomputes and all-reduces the softmax statistics."""
    return _backward(_Chunked.apply(inputs.hidden_TH, inputs.weight_VH, inputs), inputs)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, inputs: Inputs) -> Tensor:
        ctx.inputs = inputs
        logps = []
        for part in _parts(len(hidden_TH)):
            logp_CV = _log_softmax(hidden_TH[part], weight_VH, inputs)
            owned_C, row_C = inputs.shard.localize(inputs.target_T[part])
            logp_C = logp_CV.gather(1, row_C[:, None]).squeeze(1).where(owned_C, 0.0)
            dist.all_reduce(logp_C, group=inputs.groups.tensor)
            logps.append(logp_C)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs: Inputs = ctx.inputs
        hidden_TH, weight_VH = inputs.hidden_TH.detach(), inputs.weight_VH.detach()
        grad_TH, grad_VH = torch.empty_like(hidden_TH), torch.zeros_like(weight_VH)
        for part in _parts(len(hidden_TH)):
            owned_C, row_C = inputs.shard.localize(inputs.target_T[part])
            upstream_C = upstream[0][part]
            grad_CV = _log_softmax(hidden_TH[part], weight_VH, inputs).exp_().mul_(-upstream_C[:, None])
            grad_CV.scatter_add_(1, row_C[:, None], (upstream_C * owned_C)[:, None])
            low_CV = grad_CV.to(hidden_TH.dtype)
            torch.mm(low_CV, weight_VH, out=grad_TH[part])
            grad_VH.addmm_(low_CV.t(), hidden_TH[part])
        dist.all_reduce(grad_TH, group=inputs.groups.tensor)
        return grad_TH, grad_VH, None


def _parts(num_tokens: int) -> list[slice]:
    return [slice(first, min(first + CHUNK, num_tokens)) for first in range(0, num_tokens, CHUNK)]


def _log_softmax(hidden_CH: Tensor, weight_VH: Tensor, inputs: Inputs) -> Tensor:
    """Return this rank's columns of the log-softmax over the whole vocabulary; two all-reduces."""
    logits_CV = (hidden_CH @ weight_VH.t()).float()
    largest_C = logits_CV.amax(dim=1, keepdim=True)
    dist.all_reduce(largest_C, op=dist.ReduceOp.MAX, group=inputs.groups.tensor)
    logits_CV.sub_(largest_C)
    total_C = logits_CV.exp().sum(dim=1, keepdim=True)
    dist.all_reduce(total_C, group=inputs.groups.tensor)
    return logits_CV.sub_(total_C.log_())
