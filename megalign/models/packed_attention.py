"""Implements causal attention over packed rows in plain torch, with context parallelism; imports no Megatron.

Megatron's local attention has no packed input and no context parallelism. Axes: T token positions of a row, L those
that this context rank holds, N heads, K key/value heads, D head dimension, V that of values.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

try:  # torch >= 2.10; used on CUDA in half precision only
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Scores:
    """Holds the settings of a layer's attention scores; None: as in Llama."""

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None


class PackedAttention:
    """Computes causal attention inside each slot of a packed row.

    cu_seqlens: the slots' borders, int32 [slots + 1]. Under context parallelism they are those of the whole row, of
    which each rank holds `data.micro_batch.context_part`; keys and values are gathered.
    """

    def __init__(self, scores: Scores, context: dist.ProcessGroup | None) -> None:
        self.scores, self.context = scores, context

    def __call__(
        self, query_LND: Tensor, key_LKD: Tensor, value_LKD: Tensor, cu_seqlens: Tensor, sinks_N: Tensor | None = None
    ) -> Tensor:
        """Return [L, N, V] of query [L, N, D], key [L, K, D] and value [L, K, V]; sinks_N: see `_attend`."""
        plain = self.scores.softcap is None and sinks_N is None and key_LKD.shape == value_LKD.shape
        half = query_LND.dtype in (torch.bfloat16, torch.float16)
        flash = query_LND.is_cuda and varlen_attn is not None and half and plain
        if self.context is not None and self.context.size() > 1:
            both = torch.cat((key_LKD, value_LKD), dim=-1)
            sizes = [key_LKD.shape[-1], value_LKD.shape[-1]]
            key_T, value_T = _whole_row(both, cu_seqlens, self.context).split(sizes, dim=-1)
            if flash:
                return _varlen_by_run(query_LND, key_T, value_T, cu_seqlens, self.scores, self.context)
            return _by_run(query_LND, key_T, value_T, cu_seqlens, self.scores, sinks_N, self.context)
        if flash:
            return _varlen(query_LND, key_LKD, value_LKD, cu_seqlens, self.scores)
        return _by_slot(query_LND, key_LKD, value_LKD, cu_seqlens, self.scores, sinks_N)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores, sinks_N: Tensor | None
) -> Tensor:
    """Attend with query [B, N, queries, D], key [B, K, keys, D], value [B, K, keys, V]; mask [queries, keys] or causal.

    Soft caps: cap * tanh(score / cap). A sink is one more score in the softmax, whose weight is dropped.
    """
    grouped = query.shape[1] != key.shape[1]
    if scores.softcap is None and sinks_N is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped, scale=scores.scale
        )
    if grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    score = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scores.scale is None else scores.scale)
    if scores.softcap is not None:
        score = scores.softcap * torch.tanh(score / scores.softcap)
    if mask is None:
        mask = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril()
    score = score.masked_fill(~mask, float("-inf"))
    if sinks_N is not None:
        sink = sinks_N.to(score.dtype).view(1, -1, 1, 1).expand(*score.shape[:-1], 1)
        score = torch.cat((score, sink), dim=-1)
    exact = score if score.dtype == torch.float64 else score.float()
    share = exact.softmax(dim=-1).to(value.dtype)
    return (share if sinks_N is None else share[..., :-1]) @ value


class _Gather(torch.autograd.Function):
    """All-gather over context ranks, [ranks, ...]; backward reduce-scatters the gradients."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = mine.new_empty(group.size(), *mine.shape)
        dist.all_gather_into_tensor(parts.view(-1), mine.contiguous().view(-1), group=group)
        return parts

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        grad = upstream[0].contiguous()
        if grad.is_cuda:
            mine = torch.empty_like(grad[0])
            dist.reduce_scatter_tensor(mine, grad, group=ctx.group)
            return mine, None
        dist.all_reduce(grad, group=ctx.group)  # gloo has no reduce-scatter
        return grad[ctx.group.rank()], None


def _whole_row(mine: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather all positions in the row's order from ranks that hold a run of each slot and its mirror image."""
    ranks = group.size()
    parts = _Gather.apply(mine, group)  # [ranks, L, ...]
    sizes = (cu_seqlens.diff() // ranks).tolist()  # of a slot on one rank
    slots = []
    for part in parts.split(sizes, dim=1):
        early, late = part.chunk(2, dim=1)
        slots.append(torch.cat((early.flatten(0, 1), late.flip(0).flatten(0, 1))))
    return torch.cat(slots)


def _runs(cu_seqlens: Tensor, group: dist.ProcessGroup) -> list[tuple[int, int, int]]:
    """Return (queries, first key, keys) of this rank's two runs of each slot; a run sees its slot up to its own end."""
    ranks, rank = group.size(), group.rank()
    borders = cu_seqlens.tolist()
    runs = []
    for first, last in itertools.pairwise(borders):
        size = (last - first) // (2 * ranks)
        runs += [(size, first, (rank + 1) * size), (size, first, (2 * ranks - rank) * size)]
    return runs


def _by_run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scores: Scores,
    sinks_N: Tensor | None,
    group: dist.ProcessGroup,
) -> Tensor:
    """Attend run by run: queries [L, N, D] of this rank, keys and values [T, K, D] of the whole row."""
    runs = _runs(cu_seqlens, group)
    slots = cu_seqlens.diff().tolist()
    # split instead of slices of the row, for the reason in `_by_slot`; slices inside a slot cost only that slot.
    keys, values = key.split(slots), value.split(slots)
    out = []
    for index, (queries, (size, _, seen)) in enumerate(zip(query.split([run[0] for run in runs]), runs, strict=True)):
        k, v = keys[index // 2][:seen], values[index // 2][:seen]
        position = torch.arange(seen - size, seen, device=query.device)[:, None]
        distance = position - torch.arange(seen, device=query.device)
        mask = (distance >= 0) if scores.window is None else (distance >= 0) & (distance < scores.window)
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (queries, k, v))
        out.append(_attend(q, k, v, mask, scores, sinks_N)[0].transpose(0, 1))
    return torch.cat(out)


def _varlen_by_run(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scores: Scores, group: dist.ProcessGroup
) -> Tensor:
    """Attend run by run with torch's varlen flash attention, which aligns a run's last query with its last key."""
    runs = _runs(cu_seqlens, group)
    index = torch.cat([torch.arange(first, first + seen) for _, first, seen in runs]).to(query.device)
    key, value = key[index], value[index]
    borders = [torch.tensor([0, *sizes]).cumsum(0) for sizes in ([run[0] for run in runs], [run[2] for run in runs])]
    query_borders, key_borders = (border.to(query.device, torch.int32) for border in borders)
    longest = max(run[0] for run in runs), max(run[2] for run in runs)
    return _flash(query, key, value, (query_borders, key_borders), longest, scores)


def _by_slot(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scores: Scores, sinks_N: Tensor | None
) -> Tensor:
    """Attend slot by slot; neighbours of equal length form one batch."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    runs = [(length, len(list(equal))) for length, equal in itertools.groupby(lengths)]
    sizes = [length * count for length, count in runs]
    out = []
    # split instead of slices: the backward of each slice would allocate and add a gradient of the whole row's size.
    parts = zip(runs, query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
    for (length, count), *slots in parts:
        q, k, v = (slot.unflatten(0, (count, length)).transpose(1, 2) for slot in slots)
        context = _attend(q, k, v, _window_mask(length, scores.window, q.device), scores, sinks_N)
        out.append(context.transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return the bool mask [length, length] of a causal window of `window` positions; None where it covers all."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scores: Scores) -> Tensor:
    """Attend with torch's variable-length flash attention (CUDA, half precision)."""
    longest = int(cu_seqlens.diff().max())
    borders = cu_seqlens.to(query.device)  # which may lie on the CPU: nothing waits for the device then
    return _flash(query, key, value, (borders, borders), (longest, longest), scores)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scores: Scores,
) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    left = -1 if scores.window is None else scores.window - 1
    output = varlen_attn(query, key, value, *borders, *longest, scale=scores.scale, window_size=(left, 0))
    return output  # type: ignore[no-any-return,return-value]
