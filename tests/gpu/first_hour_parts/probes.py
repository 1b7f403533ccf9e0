"""Probes of single operations: products, sums, deterministic mode, copies."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tests.gpu.first_hour_parts.device import CUDA, clock_problem, relative
from tests.gpu.first_hour_parts.report import Report, Skip

HALF = torch.bfloat16
SUMS_IN_PLACE = (2, 10)  # the first torch whose addmm takes an fp32 sum with operands of half precision
REPEATS = 8


def torch_version() -> tuple[int, int]:
    """Return torch's major and minor version."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def products(report: Report) -> None:
    """Check the head's products: half precision into fp32, added in place, also transposed; and fp32 without TF32."""
    rows, inner, columns = (64, 32, 48) if report.small else (4096, 2048, 1024)
    random = torch.Generator().manual_seed(0)
    plain = [torch.randn(*shape, generator=random).to(CUDA) for shape in ((rows, inner), (inner, columns))]
    for dtype in (HALF, torch.float16):
        left, right = (each.to(dtype) for each in plain)
        exact = left.double() @ right.double()
        forms = {"": left, ", left transposed": left.t().contiguous().t()}
        for name, operand in forms.items():
            total = torch.ones(rows, columns, device=CUDA)
            try:
                torch.addmm(total, operand, right, out_dtype=torch.float32, out=total)
                found = f"accepted, off by {relative(total, exact + 1):.1e}"
                right_answer = relative(total, exact + 1) < 1e-5
            except RuntimeError as error:
                found, right_answer = f"refused: {str(error)[:120]}", True
            accepted = torch_version() >= SUMS_IN_PLACE
            holds = right_answer and found.startswith("accepted") == accepted
            expected = "accepted, with fp32's values" if accepted else "refused by this torch, which the head knows"
            report.check(f"addmm of {dtype}{name} adds to fp32 in place", holds, expected=expected, found=found)
        product = torch.empty(rows, columns, device=CUDA)
        torch.mm(left, right, out_dtype=torch.float32, out=product)
        report.within(f"mm of {dtype} into fp32, off by", relative(product, exact), 1e-5)
    exact = plain[0].double() @ plain[1].double()
    report.within("product of fp32, off by (TF32: 1e-4)", relative(plain[0] @ plain[1], exact), 5e-6)


def _spread(call: Callable[[], Tensor]) -> float:
    """Return the largest difference between equal calls."""
    first = call()
    return max(float((first - call()).abs().max()) for _ in range(REPEATS))


def sums(report: Report) -> None:
    """Check that sums of experts have the same bits in every call, and that plain atomics do not."""
    from megatron.core.transformer.moe import moe_utils

    from megalign.models import experts

    tokens, hidden, number, top = (65, 16, 8, 4) if report.small else (4096, 1024, 64, 4)
    random = torch.Generator().manual_seed(3)
    chosen = torch.zeros(tokens, number, dtype=torch.bool)
    chosen.scatter_(1, torch.rand(tokens, number, generator=random).topk(top).indices, True)
    routing = chosen.to(CUDA)
    token_TH = torch.randn(tokens, hidden, generator=random).to(HALF).to(CUDA)
    _, _, token_R = experts.permute(token_TH, routing, None, tokens * top)
    right_R = chosen.t().reshape(-1).nonzero().squeeze(1) % tokens
    report.check("rows in the experts' order", torch.equal(token_R.cpu(), right_R), expected="yes", found="see verdict")
    row_RH = torch.randn(tokens * top, hidden, generator=random).to(HALF).to(CUDA)

    def atomics() -> Tensor:
        index_RH = token_R[:, None].expand_as(row_RH)
        return torch.zeros(tokens, hidden, dtype=HALF, device=CUDA).scatter_add_(0, index_RH, row_RH)

    def spread_gradient() -> Tensor:
        leaf_TH = token_TH.detach().clone().requires_grad_()
        return torch.autograd.grad(experts.permute(leaf_TH, routing, None, tokens * top)[0], leaf_TH, row_RH)[0]

    shape = torch.Size((tokens, hidden))
    ours = _spread(lambda: experts.unpermute(row_RH, token_R, shape, routing_map=routing))
    backward = _spread(spread_gradient)
    theirs = _spread(lambda: moe_utils.unpermute(row_RH, token_R, shape, routing_map=routing))
    plain = _spread(atomics)
    for name, differ in (("scatter_add of bf16", plain), ("Megatron's unpermute", theirs)):
        if report.small and not differ:
            report.skip(f"{name}, equal calls differ by", "nothing: so few rows need not meet")
        else:
            report.check(f"{name}, equal calls differ by", differ > 0, expected="above 0", found=f"{differ:.3g}")
    report.within("our sums of experts, equal calls differ by", ours, 0.0)
    report.within("our gradient of tokens, equal calls differ by", backward, 0.0)
    exact_TH = torch.zeros(tokens, hidden, dtype=torch.float64).index_add(0, token_R.cpu(), row_RH.cpu().double())
    mine_TH = experts.unpermute(row_RH, token_R, shape, routing_map=routing).cpu()
    report.within("our sums of experts, off by", relative(mine_TH, exact_TH), 4e-3)


def deterministic(report: Report) -> None:
    """Check that sampling needs nothing that deterministic mode refuses."""
    from megalign.rollout.transformers_sampler import pick

    vocabulary = 1031 if report.small else 151936
    random = torch.Generator().manual_seed(4)
    logits = torch.randn(16, vocabulary, generator=random)
    uniform = torch.rand(16, dtype=torch.float64, generator=random)
    right = pick(logits, uniform, 0.7)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as a job of megalign sets it
    torch.use_deterministic_algorithms(True)
    try:
        logits.to(CUDA).cumsum(0)
        found = "accepted"
    except RuntimeError as error:
        found = f"refused: {str(error)[:100]}"
    report.check("cumsum of floats", found.startswith("refused"), expected="refused", found=found)
    mine = pick(logits.to(CUDA), uniform.to(CUDA), 0.7)
    same = int((mine[0].cpu() == right[0]).sum())
    report.check("tokens as on the CPU", same >= 15, expected="at least 15 of 16 (rounding)", found=same)
    agree = mine[0].cpu() == right[0]
    report.within("their log-probs, off by", float((mine[1].cpu() - right[1])[agree].abs().max()), 1e-4)


def copies(report: Report) -> None:
    """Check that the host goes on while the device is busy, after copies from pinned memory."""
    from megalign.ops.transfer import to_device

    problem = clock_problem()
    if problem is not None or not hasattr(torch._C, "_cuda_sleep"):
        raise Skip(problem or "this torch has no torch.cuda._sleep")
    values = torch.arange(1 << (12 if report.small else 22))
    to_device(values, CUDA)  # pinned memory is made once
    torch.cuda.synchronize()
    ways = {"pinned": lambda: to_device(values, CUDA), "pageable": lambda: values.to(CUDA)}
    for name, way in ways.items():
        done = torch.cuda.Event()
        torch.cuda._sleep(1_000_000_000)  # cycles: about half a second
        done.record()
        start = time.monotonic()
        copy = way()
        took, waited = time.monotonic() - start, done.query()
        torch.cuda.synchronize()
        assert torch.equal(copy.cpu(), values)
        report.figure(f"{name}: host held for", f"{1000 * took:.1f} ms")
        if name == "pinned":
            report.check("copy from pinned memory waits", not waited, expected="no", found="yes" if waited else "no")
