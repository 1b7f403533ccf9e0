"""Order records over epochs: step n takes the same records on every parallel layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megalign.data.pairing import generator

Item = tuple[int, int]  # (epoch, index of the group in the data set)


class Span(NamedTuple):
    """Describes the records of one source; spans follow each other in the data set."""

    num_records: int
    weight: float = 1.0

    @property
    def per_epoch(self) -> int:
        """Return the number of records that an epoch takes from the source."""
        # The small addition keeps 0.29 * 100 from being 28.
        return max(1, math.floor(self.weight * self.num_records + 1e-9)) if self.num_records else 0


def step_items(step: int, spans: Sequence[Span], *, groups_per_step: int, seed: int, shuffle: bool) -> list[Item]:
    """Return the items of step `step` (from 0), taken from the concatenated epochs.

    A step may straddle epochs; resuming needs only the step's number.
    """
    size = sum(span.per_epoch for span in spans)
    items: list[Item] = []
    epoch, begin = divmod(step * groups_per_step, size)
    while len(items) < groups_per_step:
        order = epoch_order(epoch, tuple(spans), seed=seed, shuffle=shuffle)
        items += [(epoch, int(index)) for index in order[begin : begin + groups_per_step - len(items)]]
        epoch, begin = epoch + 1, 0
    return items


@lru_cache(maxsize=4)
def epoch_order(epoch: int, spans: tuple[Span, ...], *, seed: int, shuffle: bool) -> np.ndarray:
    """Return the record indices of one epoch, a function of (seed, epoch).

    A source is itself an endless stream of its permutations, of which each epoch takes the next `per_epoch`:
    whatever the weight, no record repeats before every other record of its source has been taken.
    """
    parts = []
    first = 0
    for source, span in enumerate(spans):
        begin = epoch * span.per_epoch
        cycles = range(begin // max(1, span.num_records), -(-(begin + span.per_epoch) // max(1, span.num_records)))
        orders = [_cycle(cycle, span.num_records, seed=seed, source=source, shuffle=shuffle) for cycle in cycles]
        if orders:
            skip = begin - cycles.start * span.num_records
            parts.append(first + np.concatenate(orders)[skip : skip + span.per_epoch])
        first += span.num_records
    order = np.concatenate(parts)
    if shuffle and len(parts) > 1:
        order = generator("epoch", seed, epoch=epoch, item=0).permutation(order)
    order.flags.writeable = False  # the cache returns the same array to every caller
    return order


def _cycle(cycle: int, num_records: int, *, seed: int, source: int, shuffle: bool) -> np.ndarray:
    if not shuffle:
        return np.arange(num_records)
    return generator("cycle", seed, epoch=cycle, item=source).permutation(num_records)
