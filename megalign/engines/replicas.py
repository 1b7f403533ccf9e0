"""Compares parameters that several ranks hold by a checksum of their bits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.runtime.ranks import by_value, span

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


@dataclass(frozen=True, slots=True)
class Replica:
    """Holds a tensor of which every rank of a group must have the same bits; `axis` names the group."""

    name: str
    tensor: Tensor
    group: dist.ProcessGroup
    axis: str


def bit_sum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bits, read as whole numbers, modulo 2^64: equal tensors have equal sums.

    As numbers of 64 bits where they fill some: others must be converted one by one, which takes 40 times as long.
    """
    flat = tensor.detach().contiguous().view(-1)
    size = flat.element_size()
    if len(flat) * size % 8:
        return flat.view(BITS[size]).sum(dtype=torch.int64)
    aligned = flat if flat.storage_offset() * size % 8 == 0 else flat.clone()
    return aligned.view(torch.int64).sum()


def first_difference(replicas: Iterable[Replica], *, device: torch.device) -> str:
    """Return the first parameter whose bits differ in this rank's groups, and the ranks; "" where all are equal.

    Called on every rank. One small collective in each group, on `device`, and another where something differs.
    """
    by_group: dict[tuple[str, dist.ProcessGroup], list[Replica]] = {}
    for replica in replicas:
        if replica.group.size() > 1:
            by_group.setdefault((replica.axis, replica.group), []).append(replica)
    problems = [_difference(members, device) for members in by_group.values()]
    return next(filter(None, problems), "")


def _difference(members: list[Replica], device: torch.device) -> str:
    """Return the difference in one group."""
    group, axis = members[0].group, members[0].axis
    sum_P = torch.stack([bit_sum(member.tensor).to(device) for member in members])
    # The complement's largest is the sum's smallest, and unlike a negative number it cannot overflow.
    highest_2P = torch.cat([sum_P, ~sum_P])
    dist.all_reduce(highest_2P, op=dist.ReduceOp.MAX, group=group)
    highest_P, lowest_P = highest_2P[: len(sum_P)], ~highest_2P[len(sum_P) :]
    different = torch.nonzero(highest_P != lowest_P).flatten().tolist()
    if not different:
        return ""
    parts = [torch.empty_like(sum_P) for _ in range(group.size())]
    dist.all_gather(parts, sum_P, group=group)
    index = different[0]
    held = by_value([int(part[index]) for part in parts])
    ranks = [span(dist.get_global_rank(group, member) for member in members) for members in held.values()]
    more = f", and {len(different) - 1} more parameters" if len(different) > 1 else ""
    shown = f"{' and '.join(ranks)} differ"
    return f"parameter {members[index].name}{more}: {axis} ranks must have the same bits, but {shown}"
