"""Layers of our own in plain torch: RMSNorm that admits sequence parallelism, and attention over packed rows.

Megatron's torch norms refuse sequence parallelism, and its local attention has no packed input and no context
parallelism. Axes: T token positions of a row, L those that this context rank holds, N heads, K key/value heads, D head
dimension.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

try:  # torch >= 2.10; used on CUDA in half precision only
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]


class RMSNorm(nn.Module):
    """x / rms(x) * weight with the statistics in fp32 or better, as Hugging Face's Llama does it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each tensor rank sees its own tokens, so Megatron must sum this gradient.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype)


class PackedAttention(MegatronModule):
    """Causal attention inside each slot of a packed row; Megatron's `core_attention` interface.

    The slots' borders (`cu_seqlens`, int32 [slots + 1]) come in as `attention_mask`, because that is the one tensor
    that Megatron hands through blocks, layers and recomputation unchanged. Under context parallelism they are those of
    the whole row, of which each rank holds `data.batch.context_part`; keys and values are gathered.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, pg_collection: Any = None, **_: Any) -> None:
        super().__init__(config=config)
        self.window = config.window_size[0] + 1 if config.window_size is not None else None
        self.context: dist.ProcessGroup | None = None if pg_collection is None else pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *_: Any, **__: Any) -> Tensor:
        """query [L, 1, N, D], key and value [L, 1, K, D] -> [L, 1, N * D]."""
        query_LND, key_LKD, value_LKD = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        flash = query.is_cuda and varlen_attn is not None and query.dtype in (torch.bfloat16, torch.float16)
        if self.context is not None and self.context.size() > 1:
            both = torch.stack((key_LKD, value_LKD), dim=1)
            key_T, value_T = _whole_row(both, attention_mask, self.context).unbind(1)
            mine = (query_LND, key_T, value_T, attention_mask, self.window, self.context)
            context = _varlen_by_run(*mine) if flash else _by_run(*mine)
        elif flash:
            context = _varlen(query_LND, key_LKD, value_LKD, attention_mask, self.window)
        else:
            context = _by_slot(query_LND, key_LKD, value_LKD, attention_mask, self.window)
        return context.reshape(context.shape[0], 1, -1)


class _Gather(torch.autograd.Function):
    """Every context rank's tensor, [ranks, ...]; backward adds up what the ranks' outputs took from this one's."""

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
    """Tensors of all positions in the row's order, from ranks that hold a run of each slot and its mirror image."""
    ranks = group.size()
    parts = _Gather.apply(mine, group)  # [ranks, L, ...]
    sizes = (cu_seqlens.diff() // ranks).tolist()  # of a slot on one rank
    slots = []
    for part in parts.split(sizes, dim=1):
        early, late = part.chunk(2, dim=1)
        slots.append(torch.cat((early.flatten(0, 1), late.flip(0).flatten(0, 1))))
    return torch.cat(slots)


def _runs(cu_seqlens: Tensor, group: dist.ProcessGroup) -> list[tuple[int, int, int]]:
    """(queries, first key, keys) of this rank's two runs of each slot: a run sees its slot up to its own end."""
    ranks, rank = group.size(), group.rank()
    borders = cu_seqlens.tolist()
    runs = []
    for first, last in itertools.pairwise(borders):
        size = (last - first) // (2 * ranks)
        runs += [(size, first, (rank + 1) * size), (size, first, (2 * ranks - rank) * size)]
    return runs


def _by_run(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, window: int | None, group: dist.ProcessGroup
) -> Tensor:
    """SDPA run by run: queries [L, N, D] of this rank, keys and values [T, K, D] of the whole row."""
    runs = _runs(cu_seqlens, group)
    slots = cu_seqlens.diff().tolist()
    # split, not slices of the row, for the reason in `_by_slot`; a slot's own slices are as long as what they skip.
    keys, values = key.split(slots), value.split(slots)
    out = []
    for place, (queries, (size, _, seen)) in enumerate(zip(query.split([run[0] for run in runs]), runs, strict=True)):
        k, v = keys[place // 2][:seen], values[place // 2][:seen]
        position = torch.arange(seen - size, seen, device=query.device)[:, None]
        distance = position - torch.arange(seen, device=query.device)
        mask = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        q, k, v = (one.transpose(0, 1)[None] for one in (queries, k, v))
        grouped = q.shape[1] != k.shape[1]
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        out.append(context[0].transpose(0, 1))
    return torch.cat(out)


def _varlen_by_run(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, window: int | None, group: dist.ProcessGroup
) -> Tensor:
    """The same by torch's variable-length flash attention, which aligns a run's last query with its last key."""
    runs = _runs(cu_seqlens, group)
    index = torch.cat([torch.arange(first, first + seen) for _, first, seen in runs]).to(query.device)
    key, value = key[index], value[index]
    borders = [torch.tensor([0, *sizes]).cumsum(0) for sizes in ([one[0] for one in runs], [one[2] for one in runs])]
    query_borders, key_borders = (one.to(query.device, torch.int32) for one in borders)
    longest = max(one[0] for one in runs), max(one[2] for one in runs)
    return _flash(query, key, value, (query_borders, key_borders), longest, window)


def _by_slot(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """SDPA slot by slot; neighbours of equal length go together as one batch."""
    grouped = query.shape[1] != key.shape[1]
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    runs = [(length, len(list(equal))) for length, equal in itertools.groupby(lengths)]
    sizes = [length * count for length, count in runs]
    out = []
    # split, not slices: the backward of a slice fills and adds a gradient as large as the whole row, for every slot.
    parts = zip(runs, query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
    for (length, count), *slots in parts:
        q, k, v = (slot.unflatten(0, (count, length)).transpose(1, 2) for slot in slots)
        mask = _window_mask(length, window, q.device)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        out.append(context.transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Bool [length, length] of a causal sliding window that sees `window` positions; None where it sees all of them."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """torch's variable-length flash attention (CUDA, half precision)."""
    longest = int(cu_seqlens.diff().max())
    return _flash(query, key, value, (cu_seqlens, cu_seqlens), (longest, longest), window)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    window: int | None,
) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    left = -1 if window is None else window - 1
    return varlen_attn(query, key, value, *borders, *longest, window_size=(left, 0))  # type: ignore[no-any-return,return-value]
