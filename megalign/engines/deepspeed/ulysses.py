"""Trades a packed row's parts for heads between context ranks (Ulysses, arXiv 2309.14509) and back.

Rank r of c holds the r-th contiguous part of the row; attention needs whole sequences, but of a head at a time. Axes:
T token positions of the row, L those of one rank, N heads, K key/value heads, D head dimension, V that of values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def context_problem(num_heads: int, num_kv_heads: int, size: int) -> str | None:
    """Return why attention of these heads cannot be split over `size` context ranks; None where it can.

    Only the query heads must be divisible: key/value heads that are not are repeated, which is exact, because the
    gradients of all repetitions add up.
    """
    if num_heads % size:
        return f"{num_heads} attention heads cannot be split over {size} context ranks"
    if num_heads % num_kv_heads:
        return f"{num_heads} attention heads do not share {num_kv_heads} key/value heads equally"
    return None


def heads_of_rank(
    query_LND: Tensor, key_LKD: Tensor, value_LKV: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of this rank's heads for all positions of the row, [T, heads, dimension]."""
    ranks = group.size()
    repeats = ranks // math.gcd(key_LKD.shape[1], ranks)
    if repeats > 1:
        key_LKD, value_LKV = (one.repeat_interleave(repeats, dim=1) for one in (key_LKD, value_LKV))
    # One exchange for all three: per rank and position, the query's, key's and value's numbers side by side.
    parts = [one.unflatten(1, (ranks, -1)).transpose(0, 1).flatten(2) for one in (query_LND, key_LKD, value_LKV)]
    whole = _Exchange.apply(torch.cat(parts, dim=-1), group).flatten(0, 1)
    query, key, value = whole.split([part.shape[-1] for part in parts], dim=-1)
    return (
        query.unflatten(1, (-1, query_LND.shape[-1])),
        key.unflatten(1, (-1, key_LKD.shape[-1])),
        value.unflatten(1, (-1, value_LKV.shape[-1])),
    )


def positions_of_rank(out_TNV: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return all heads' output for this rank's positions, [L, heads, V], of its heads' output for all positions."""
    by_rank = _Exchange.apply(out_TNV.unflatten(0, (group.size(), -1)), group)
    return by_rank.transpose(0, 1).flatten(1, 2)  # type: ignore[no-any-return]


class _Exchange(torch.autograd.Function):
    """Sends part r of [ranks, ...] to rank r and stacks what all sent; backward is the same exchange."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(parts, group)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return _exchanged(upstream[0], ctx.group), None


def _exchanged(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    received = torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
    dist.all_to_all_single(received, parts.contiguous(), group=group)
    return received
