"""Computes attention over packed rows with torch's variable-length flash kernels, sinks included.

Axes: L queries of all sequences, S keys of all sequences, N heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_HEAD_DIM, HEAD_DIM_MULTIPLE = 256, 8  # of the kernels
FEWEST_CAPABILITY = (8, 0)  # the kernels' oldest GPUs, Ampere


@dataclass(frozen=True, slots=True)
class Sequences:
    """Holds the borders of sequences, int32 [sequences + 1] on the device, of queries and of keys, and the longest.

    A sequence's last query is aligned with its last key.
    """

    borders: tuple[Tensor, Tensor]
    longest: tuple[int, int]


def can_flash(query_LND: Tensor, value_SKV: Tensor) -> bool:
    """Tell whether the kernels take such heads on this device."""
    return (
        query_LND.is_cuda
        and query_LND.dtype in (torch.bfloat16, torch.float16)
        and value_SKV.shape[-1] <= query_LND.shape[-1] <= MOST_HEAD_DIM
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query_LND.device) >= FEWEST_CAPABILITY
    )


def flash(
    query_LND: Tensor,
    key_SKD: Tensor,
    value_SKV: Tensor,
    sequences: Sequences,
    *,
    scale: float | None,
    window: int | None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """Attend causally inside each sequence; return [L, N, V].

    Heads are padded with zeros to a size that the kernels take, which changes no score and no output.
    """
    dim, value_dim = query_LND.shape[-1], value_SKV.shape[-1]
    size = dim + -dim % HEAD_DIM_MULTIPLE
    query, key, value = (
        (each if each.shape[-1] == size else F.pad(each, (0, size - each.shape[-1]))).contiguous()
        for each in (query_LND, key_SKD, value_SKV)
    )
    scale = dim**-0.5 if scale is None else scale
    left = -1 if window is None else window - 1
    if sinks_N is None:
        out = _forward(query, key, value, sequences, scale, left)[0]
    else:
        out = _WithSinks.apply(query, key, value, sinks_N, sequences, scale, left)
    return out if value_dim == size else out[..., :value_dim]


def _forward(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float, left: int
) -> tuple[Tensor, ...]:
    """Return (output, log-sum-exp [N, L], two of the kernel's own, unused).

    torch's own `varlen_attn` has had scale, windows and grouped queries at different versions; this operator under it
    has had them all along, and its gradient.
    """
    result: tuple[Tensor, ...] = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        *sequences.borders,
        *sequences.longest,
        0.0,
        left < 0,  # causal; with a window it is the window's right side that makes it so
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=0,
    )
    return result


class _WithSinks(torch.autograd.Function):
    """Adds to each head's softmax one more score, the sink, whose weight is dropped.

    With lse' = logaddexp(lse, sink) the output is out x exp(lse - lse'), and the plain kernel's backward pass gives the
    right gradients from this output and lse'; that of a sink is -sum exp(sink - lse') (dO . output).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks_N: Tensor,
        sequences: Sequences,
        scale: float,
        left: int,
    ) -> Tensor:
        plain, lse_NL, *own = _forward(query, key, value, sequences, scale, left)
        total_NL = torch.logaddexp(lse_NL, sinks_N.float()[:, None])
        out = (plain * (lse_NL - total_NL).exp_().t()[..., None]).to(plain.dtype)
        ctx.save_for_backward(query, key, value, sinks_N, out, total_NL, *own[:2])
        ctx.sequences, ctx.scale, ctx.left = sequences, scale, left
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks_N, out, total_NL, rng, unused = ctx.saved_tensors
        grad, sequences = grads[0].contiguous(), ctx.sequences
        into = torch.ops.aten._flash_attention_backward(
            grad,
            query,
            key,
            value,
            out,
            total_NL,
            *sequences.borders,
            *sequences.longest,
            0.0,
            ctx.left < 0,
            rng,
            unused,
            scale=ctx.scale,
            window_size_left=ctx.left,
            window_size_right=0,
        )
        inner_NL = (grad.float() * out).sum(dim=-1).t()
        sinks_grad_N = ((sinks_N.float()[:, None] - total_NL).exp_() * inner_NL).sum(dim=1).neg_()
        return *into, sinks_grad_N.to(sinks_N.dtype), None, None, None
