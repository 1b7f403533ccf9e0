"""Layers of our own in plain torch: norms that admit sequence parallelism, and attention over packed rows.

Megatron's torch norms refuse sequence parallelism, and its local attention has no packed input and no context
parallelism. Axes: T token positions of a row, L those that this context rank holds, N heads, K key/value heads, D head
dimension, V that of values.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

try:  # torch >= 2.10; used on CUDA in half precision only
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]


class RMSNorm(MegatronModule):
    """x / rms(x) * (offset + weight) with the statistics in fp32 or better.

    In half precision the quotient is rounded before it is multiplied, as in Llama, or after it with `in_fp32`, as in
    Gemma and OLMo.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        offset: float = 0.0,
        in_fp32: bool = False,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.eps, self.offset, self.in_fp32 = eps, offset, in_fp32
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each tensor rank sees its own tokens, so Megatron must sum this gradient.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        full = x.dtype in (torch.float32, torch.float64)
        weight = self.weight if full or not self.in_fp32 else self.weight.float()
        if self.offset:
            weight = self.offset + weight
        if full:
            return F.rms_norm(x, x.shape[-1:], weight, self.eps)
        if self.in_fp32:
            return F.rms_norm(x.float(), x.shape[-1:], weight, self.eps).to(x.dtype)
        return weight * F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype)


class SplitRMSNorm(MegatronModule):
    """RMSNorm over a dimension that tensor ranks share, of which each has its part of the weight."""

    def __init__(self, config: TransformerConfig, size: int, *, eps: float, group: dist.ProcessGroup) -> None:
        super().__init__(config=config)
        self.eps, self.tp_group = eps, group
        self.whole = size * group.size()
        self.weight = nn.Parameter(torch.ones(size, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., this rank's part] -> the same."""
        wide = x if x.dtype == torch.float64 else x.float()
        squares = wide.square().sum(dim=-1, keepdim=True)
        if self.tp_group.size() > 1:
            squares = _SumBothWays.apply(squares, self.tp_group)
        return (wide * torch.rsqrt(squares / self.whole + self.eps) * self.weight.to(wide.dtype)).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's description of the weight for `dist_checkpointing`."""
        return split_over_tensor_ranks(self, ("weight",), prefix, sharded_offsets, metadata)


class _SumBothWays(torch.autograd.Function):
    """Sum over ranks, each of which uses the sum for its own part of what follows: gradients are summed likewise."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = mine.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        total = upstream[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def split_over_tensor_ranks(
    module: MegatronModule,
    names: tuple[str, ...],
    prefix: str,
    sharded_offsets: tuple[Any, ...],
    metadata: dict[str, Any] | None,
) -> dict[str, Any]:
    """Megatron's description of a module's own parameters `names`, cut along their first dimension."""
    found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        {name: module.get_parameter(name) for name in names},
        prefix,
        dict.fromkeys(names, 0),
        sharded_offsets,
        tp_group=module.tp_group,
        dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
    )
    return found


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer's attention weighs positions; None: what it is in Llama."""

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None


class PackedAttention:
    """Causal attention inside each slot of a packed row.

    The slots' borders (`cu_seqlens`, int32 [slots + 1]) under context parallelism are those of the whole row, of which
    each rank holds `data.batch.context_part`; keys and values are gathered.
    """

    def __init__(self, scores: Scores, context: dist.ProcessGroup | None) -> None:
        self.scores, self.context = scores, context

    def __call__(
        self, query_LND: Tensor, key_LKD: Tensor, value_LKD: Tensor, cu_seqlens: Tensor, sinks_N: Tensor | None = None
    ) -> Tensor:
        """query [L, N, D], key [L, K, D], value [L, K, V] -> [L, N, V]; sinks_N: see `_attend`."""
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
    """[B, N, queries, D], [B, K, keys, D] and [B, K, keys, V] -> [B, N, queries, V]; mask [queries, keys] or causal.

    Soft caps: cap * tanh(score / cap). A sink is a score beside those of the positions, whose weight goes to nothing.
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scores: Scores,
    sinks_N: Tensor | None,
    group: dist.ProcessGroup,
) -> Tensor:
    """Attention run by run: queries [L, N, D] of this rank, keys and values [T, K, D] of the whole row."""
    runs = _runs(cu_seqlens, group)
    slots = cu_seqlens.diff().tolist()
    # split, not slices of the row, for the reason in `_by_slot`; a slot's own slices are as long as what they skip.
    keys, values = key.split(slots), value.split(slots)
    out = []
    for place, (queries, (size, _, seen)) in enumerate(zip(query.split([run[0] for run in runs]), runs, strict=True)):
        k, v = keys[place // 2][:seen], values[place // 2][:seen]
        position = torch.arange(seen - size, seen, device=query.device)[:, None]
        distance = position - torch.arange(seen, device=query.device)
        mask = (distance >= 0) if scores.window is None else (distance >= 0) & (distance < scores.window)
        q, k, v = (one.transpose(0, 1)[None] for one in (queries, k, v))
        out.append(_attend(q, k, v, mask, scores, sinks_N)[0].transpose(0, 1))
    return torch.cat(out)


def _varlen_by_run(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scores: Scores, group: dist.ProcessGroup
) -> Tensor:
    """The same by torch's variable-length flash attention, which aligns a run's last query with its last key."""
    runs = _runs(cu_seqlens, group)
    index = torch.cat([torch.arange(first, first + seen) for _, first, seen in runs]).to(query.device)
    key, value = key[index], value[index]
    borders = [torch.tensor([0, *sizes]).cumsum(0) for sizes in ([one[0] for one in runs], [one[2] for one in runs])]
    query_borders, key_borders = (one.to(query.device, torch.int32) for one in borders)
    longest = max(one[0] for one in runs), max(one[2] for one in runs)
    return _flash(query, key, value, (query_borders, key_borders), longest, scores)


def _by_slot(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scores: Scores, sinks_N: Tensor | None
) -> Tensor:
    """Attention slot by slot; neighbours of equal length go together as one batch."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    runs = [(length, len(list(equal))) for length, equal in itertools.groupby(lengths)]
    sizes = [length * count for length, count in runs]
    out = []
    # split, not slices: the backward of a slice fills and adds a gradient as large as the whole row, for every slot.
    parts = zip(runs, query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
    for (length, count), *slots in parts:
        q, k, v = (slot.unflatten(0, (count, length)).transpose(1, 2) for slot in slots)
        context = _attend(q, k, v, _window_mask(length, scores.window, q.device), scores, sinks_N)
        out.append(context.transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Bool [length, length] of a causal sliding window that sees `window` positions; None where it sees all of them."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scores: Scores) -> Tensor:
    """torch's variable-length flash attention (CUDA, half precision)."""
    longest = int(cu_seqlens.diff().max())
    return _flash(query, key, value, (cu_seqlens, cu_seqlens), (longest, longest), scores)


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
    found = varlen_attn(query, key, value, *borders, *longest, scale=scores.scale, window_size=(left, 0))
    return found  # type: ignore[no-any-return,return-value]
