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
from torch.utils.checkpoint import checkpoint

from megalign.models.flash import Sequences, can_flash, flash
from megalign.models.slots import Slots

# Bytes of scores of one slot's heads that are held at a time where no kernel of torch computes them; above that,
# queries go in chunks, whose scores backward computes again.
SCORE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Scores:
    """Holds the settings of a layer's attention scores; None: as in Llama."""

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None


class PackedAttention:
    """Computes causal attention inside each slot of a packed row.

    Under context parallelism (`slots.context`) each rank holds `data.micro_batch.context_part` of the whole row; keys
    and values are gathered.
    """

    def __init__(self, scores: Scores) -> None:
        self.scores = scores

    def __call__(
        self, query_LND: Tensor, key_LKD: Tensor, value_LKD: Tensor, slots: Slots, sinks_N: Tensor | None = None
    ) -> Tensor:
        """Return [L, N, V] of query [L, N, D], key [L, K, D] and value [L, K, V]; sinks_N: see `_attend`."""
        scores = self.scores
        flashes = scores.softcap is None and can_flash(query_LND, value_LKD)
        if slots.context is None:
            if not flashes:
                return _by_slot(query_LND, key_LKD, value_LKD, slots, scores, sinks_N)
            whole = Sequences((slots.borders, slots.borders), (slots.longest, slots.longest))
            return flash(
                query_LND, key_LKD, value_LKD, whole, scale=scores.scale, window=scores.window, sinks_N=sinks_N
            )
        both = _Gather.apply(torch.cat((key_LKD, value_LKD), dim=-1), slots)
        key_TKD, value_TKV = both.split([key_LKD.shape[-1], value_LKD.shape[-1]], dim=-1)
        if not flashes:
            return _by_run(query_LND, key_TKD, value_TKV, slots, scores, sinks_N)
        key_TKD, value_TKV = (each.index_select(0, slots.keys_of_runs) for each in (key_TKD, value_TKV))
        longest = max((run[0] for run in slots.runs), default=0), max((run[1] for run in slots.runs), default=0)
        runs = Sequences(slots.run_borders, longest)
        return flash(query_LND, key_TKD, value_TKV, runs, scale=scores.scale, window=scores.window, sinks_N=sinks_N)


class _Gather(torch.autograd.Function):
    """Gathers all positions in the row's order over the context ranks; backward reduce-scatters the gradients."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, slots: Slots) -> Tensor:
        assert slots.context is not None
        ctx.slots = slots
        parts = mine.new_empty(slots.context.size() * len(mine), *mine.shape[1:])
        dist.all_gather_into_tensor(parts.view(-1), mine.contiguous().view(-1), group=slots.context)
        return parts.index_select(0, slots.order[0])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        group: dist.ProcessGroup = ctx.slots.context
        grad = upstream[0].index_select(0, ctx.slots.order[1])
        if grad.is_cuda:
            mine = grad.new_empty(len(grad) // group.size(), *grad.shape[1:])
            dist.reduce_scatter_tensor(mine, grad, group=group)
            return mine, None
        dist.all_reduce(grad, group=group)  # gloo has no reduce-scatter
        return grad.chunk(group.size())[group.rank()] if len(grad) else grad, None


def _by_slot(query: Tensor, key: Tensor, value: Tensor, slots: Slots, scores: Scores, sinks_N: Tensor | None) -> Tensor:
    """Attend slot by slot; neighbours of equal length form one batch."""
    runs = [(length, len(list(equal))) for length, equal in itertools.groupby(slots.sizes)]
    sizes = [length * count for length, count in runs]
    out = []
    # split instead of slices: the backward of each slice would allocate and add a gradient of the whole row's size.
    parts = zip(runs, query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
    for (length, count), *each in parts:
        q, k, v = (slot.unflatten(0, (count, length)).transpose(1, 2) for slot in each)
        context = _attend(q, k, v, scores, sinks_N)
        out.append(context.transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


def _by_run(query: Tensor, key: Tensor, value: Tensor, slots: Slots, scores: Scores, sinks_N: Tensor | None) -> Tensor:
    """Attend run by run: queries [L, N, D] of this rank, keys and values [T, K, D] of the whole row."""
    # split instead of slices of the row, for the reason in `_by_slot`; slices inside a slot cost only that slot.
    keys, values = key.split(slots.sizes), value.split(slots.sizes)
    out = []
    for index, (queries, (_, seen)) in enumerate(
        zip(query.split([run[0] for run in slots.runs]), slots.runs, strict=True)
    ):
        k, v = keys[index // 2][:seen], values[index // 2][:seen]
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (queries, k, v))
        out.append(_attend(q, k, v, scores, sinks_N)[0].transpose(0, 1))
    return torch.cat(out)


def _attend(query: Tensor, key: Tensor, value: Tensor, scores: Scores, sinks_N: Tensor | None) -> Tensor:
    """Attend with query [B, N, queries, D], key [B, K, keys, D], value [B, K, keys, V]; the last ones are aligned.

    Soft caps: cap * tanh(score / cap). A sink is one more score in the softmax, whose weight is dropped.
    """
    repeats, queries, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    if scores.softcap is None and sinks_N is None:
        mask = None
        if queries != keys or (scores.window is not None and keys > scores.window):
            mask = _mask(queries, keys, scores.window, query.device)
        if repeats > 1 and query.is_cuda:  # with grouped queries CUDA has no fp32 kernel but the one of whole scores
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=query.shape[1] != key.shape[1],
            scale=scores.scale,
        )
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    row_bytes = query.shape[0] * query.shape[1] * keys * query.element_size()
    chunk = max(1, SCORE_BYTES // max(1, row_bytes))
    if chunk >= queries:
        return _plainly(query, key, value, sinks_N, scores)
    out = []
    for first in range(0, queries, chunk):
        part = query[:, :, first : first + chunk]
        seen = keys - queries + first + part.shape[2]
        # The window's first key of this chunk's first query.
        begin = 0 if scores.window is None else max(0, keys - queries + first + 1 - scores.window)
        taken = part, key[:, :, begin:seen], value[:, :, begin:seen], sinks_N, scores
        out.append(checkpoint(_plainly, *taken, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(out, dim=2)


def _plainly(query: Tensor, key: Tensor, value: Tensor, sinks_N: Tensor | None, scores: Scores) -> Tensor:
    """Attend by whole score matrices, [B, N, queries, keys]."""
    score = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scores.scale is None else scores.scale)
    if scores.softcap is not None:
        score = scores.softcap * torch.tanh(score / scores.softcap)
    score = score.masked_fill(~_mask(score.shape[-2], score.shape[-1], scores.window, score.device), float("-inf"))
    if sinks_N is not None:
        sink = sinks_N.to(score.dtype).view(1, -1, 1, 1).expand(*score.shape[:-1], 1)
        score = torch.cat((score, sink), dim=-1)
    exact = score if score.dtype == torch.float64 else score.float()
    share = exact.softmax(dim=-1).to(value.dtype)
    return (share if sinks_N is None else share[..., :-1]) @ value


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys a query sees, bool [queries, keys]; the last query is aligned with the last key."""
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    distance = position - torch.arange(keys, device=device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)
