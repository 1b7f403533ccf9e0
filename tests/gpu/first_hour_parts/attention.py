"""Probes of attention over packed rows: values and gradients against float64, equal bits, memory."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from tests.gpu.first_hour_parts.device import CUDA, memory_problem, peak_bytes, relative
from tests.gpu.first_hour_parts.report import Report, Skip
from tests.gpu_pretended.kernel_checks import attend_slowly

HALF = torch.bfloat16
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 5},
    "sinks": {"sinks": True},
    "window and sinks": {"window": 3, "sinks": True},
}


def draw(
    sizes: list[int], heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, *, sinks: bool
) -> list[Tensor]:
    """Draw query, key, value, sinks where asked for, and the gradient of the output, on the CPU."""
    random = torch.Generator().manual_seed(dims[0])
    shapes: list[tuple[int, ...]] = [(heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1])]
    inputs = [torch.randn(sum(sizes), *shape, generator=random).to(dtype) for shape in shapes]
    if sinks:
        inputs.append(torch.randn(heads[0], generator=random).to(dtype))
    return [*inputs, torch.randn(sum(sizes), heads[0], dims[1], generator=random).to(dtype)]


def run(inputs: list[Tensor], sizes: list[int], window: int | None) -> list[Tensor]:
    """Return the output and all gradients of our attention on the device."""
    from megalign.models.packed_attention import PackedAttention, Scores
    from megalign.models.slots import Slots

    *mine, upstream = (each.to(CUDA).detach() for each in inputs)
    mine = [each.requires_grad_() for each in mine]
    slots = Slots(torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32), CUDA)
    out = PackedAttention(Scores(window=window))(*mine[:3], slots, *mine[3:])
    return [out.detach(), *torch.autograd.grad(out, mine, upstream)]


def worst(sizes: list[int], heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, **wanted: Any) -> float:
    """Return the largest relative distance of the output or a gradient from float64 on the CPU."""
    inputs = draw(sizes, heads, dims, dtype, sinks=bool(wanted.get("sinks")))
    exact = [each.double().requires_grad_() for each in inputs[:-1]]
    right = attend_slowly(*exact[:3], sizes, window=wanted.get("window"), sinks=exact[3] if exact[3:] else None)
    answers = [right, *torch.autograd.grad(right, exact, inputs[-1].double())]
    found = run(inputs, sizes, wanted.get("window"))
    return max(relative(each.cpu(), answer) for each, answer in zip(found, answers, strict=True))


def attention(report: Report) -> None:
    """Check the kernels with grouped heads, windows, sinks, every size of heads, and latent heads."""
    from megalign.models.flash import can_flash

    sizes, dim = ([9, 3, 17, 3], 24) if report.small else ([129, 1, 300, 64], 128)
    query = torch.zeros(4, 8, dim, dtype=HALF, device=CUDA)
    taken = can_flash(query, query)
    report.check("bf16 takes the variable-length kernels", taken, expected="yes", found="yes" if taken else "no")
    for dtype, limit in ((HALF, 2e-2), (torch.float32, 1e-5)):
        for kind, wanted in KINDS.items():
            off = max(worst(sizes, heads, (dim, dim), dtype, **wanted) for heads in ((8, 8), (8, 2), (8, 1)))
            report.within(f"{dtype}, {kind}, 8 heads share 8, 2, 1 keys: off by", off, limit)
    for size in (8, 64, 100, 192, 256, 264):
        report.within(
            f"bf16, heads of {size}, forward and backward: off by", worst(sizes, (4, 2), (size, size), HALF), 2e-2
        )
    report.within("bf16, latent heads of 192 and 128: off by", worst(sizes, (4, 4), (192, 128), HALF), 2e-2)
    inputs = draw(sizes, (8, 2), (dim, dim), HALF, sinks=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as a job of megalign sets it
    torch.use_deterministic_algorithms(True)
    first, *others = (run(inputs, sizes, None) for _ in range(4))
    same = all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    report.check(
        "equal bits of equal passes in deterministic mode", same, expected="yes", found="yes" if same else "no"
    )


def memory(report: Report) -> None:
    """Check that attention in fp32, and sinks in bf16, hold much less than one head's whole scores for all heads."""
    from torch.nn.functional import scaled_dot_product_attention as attend

    problem = memory_problem()
    if problem is not None:
        raise Skip(problem)
    tokens, heads, keys, dim = (4096 if report.small else 8192), 16, 2, 64
    scores = 4 * heads * tokens * tokens
    cases = (("fp32, grouped keys", torch.float32, False), ("bf16, sinks", HALF, True))
    for name, dtype, sinks in cases:
        inputs = [each.to(CUDA) for each in draw([tokens], (heads, keys), (dim, dim), dtype, sinks=sinks)]
        held = peak_bytes(lambda inputs=inputs: run(inputs, [tokens], None))
        report.within(f"{name}, {tokens} tokens: MB beyond the inputs", held / 1e6, scores / 4 / 1e6)
    q, k, v, _ = (
        each.transpose(0, 1)[None].to(CUDA)
        for each in draw([tokens], (heads, keys), (dim, dim), torch.float32, sinks=False)
    )
    plain = peak_bytes(lambda: attend(q, k, v, is_causal=True, enable_gqa=True))
    report.figure("fp32, grouped keys in SDPA itself: MB", round(plain / 1e6))
    report.figure("whole scores: MB", round(scores / 1e6))
