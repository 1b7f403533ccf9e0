"""Describes the slots of a packed row to attention: as numbers for the host and as borders on the device.

Axes: T token positions of a row, L those that this context rank holds. Under context parallelism a rank holds a run of
each slot and its mirror image (`data.micro_batch.context_part`); a run sees its slot up to its own end.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.ops.transfer import to_device


class Slots:
    """Holds the borders of a row's slots; what the layers need of them is made once a micro-batch.

    cu_seqlens: int32 [slots + 1], those of the whole row; on the CPU, or the host waits for the device once.
    """

    def __init__(self, cu_seqlens: Tensor, device: torch.device, context: dist.ProcessGroup | None = None) -> None:
        self.device = device
        self.context = context if context is not None and context.size() > 1 else None
        self._ends: list[int] = cu_seqlens.tolist()

    @property
    def sizes(self) -> list[int]:
        """Return the number of positions of each slot."""
        return [last - first for first, last in itertools.pairwise(self._ends)]

    @property
    def longest(self) -> int:
        """Return the number of positions of the longest slot."""
        return max(self.sizes, default=0)

    @cached_property
    def borders(self) -> Tensor:
        """Return the borders on the device, int32 [slots + 1]."""
        return self._on_device(self._ends, torch.int32)

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """Return (queries, keys that they see) of this rank's two runs of each slot."""
        assert self.context is not None
        ranks, rank = self.context.size(), self.context.rank()
        sizes = [size // (2 * ranks) for size in self.sizes]
        return [run for size in sizes for run in ((size, (rank + 1) * size), (size, (2 * ranks - rank) * size))]

    @cached_property
    def run_borders(self) -> tuple[Tensor, Tensor]:
        """Return the borders of the runs' queries and of their keys on the device, int32 [runs + 1] each."""
        columns = zip(*self.runs, strict=True) if self.runs else ([], [])
        queries, keys = (self._on_device([0, *itertools.accumulate(each)], torch.int32) for each in columns)
        return queries, keys

    @cached_property
    def keys_of_runs(self) -> Tensor:
        """Return the positions in the row of all runs' keys, one run after the other, int64."""
        firsts = [first for first in self._ends[:-1] for _ in range(2)]
        parts = [torch.arange(first, first + seen) for first, (_, seen) in zip(firsts, self.runs, strict=True)]
        return to_device(torch.cat([torch.zeros(0, dtype=torch.int64), *parts]), self.device)

    @cached_property
    def order(self) -> tuple[Tensor, Tensor]:
        """Return where the row's positions are among those of all ranks laid end to end, int64 [T], and the inverse."""
        assert self.context is not None
        ranks = self.context.size()
        sizes = [size // (2 * ranks) for size in self.sizes]
        place = torch.arange(2 * sum(sizes) * ranks).view(ranks, -1)
        slots = []
        for part in place.split([2 * size for size in sizes], dim=1):
            early, late = part.chunk(2, dim=1)
            slots += [early.flatten(), late.flip(0).flatten()]
        order_T = torch.cat([torch.zeros(0, dtype=torch.int64), *slots])
        return to_device(order_T, self.device), to_device(order_T.argsort(), self.device)

    def _on_device(self, numbers: Sequence[int], dtype: torch.dtype) -> Tensor:
        return to_device(torch.tensor(numbers, dtype=dtype), self.device)
