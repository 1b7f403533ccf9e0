"""Which sequences share a micro-batch, and which rank runs it. Nothing here may change a number of the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Unit = tuple[int, ...]


class _Bin(NamedTuple):
    """Units that share a micro-batch, the costly first."""

    units: tuple[Unit, ...]
    cost: int  # token positions


def plan(
    lengths: Sequence[int],
    units: Sequence[Sequence[int]],
    *,
    num_ranks: int,
    budget: int,
    pad_rows: bool,
    min_per_rank: int = 1,
) -> list[list[tuple[int, ...]]]:
    """rank -> micro-batches -> sequence indices; every rank gets the same number, empty tuples (dummies) at the end.

    A unit (a whole group, or one sequence) is never split; one above the budget is a micro-batch of its own.
    Cost is the sum of lengths, or with `pad_rows` rows times the longest. min_per_rank: an interleaved pipeline
    needs as many micro-batches as it has stages.
    """
    bins = _first_fit(lengths, [tuple(unit) for unit in units], budget=budget, pad_rows=pad_rows)
    per_rank = max(min_per_rank, -(-len(bins) // num_ranks))
    bins = _split(lengths, bins, per_rank * num_ranks, pad_rows=pad_rows)
    ranks: list[list[tuple[int, ...]]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for one in sorted(bins, key=_order):
        # Longest first to the rank with the least, among those that have room: unequal counts would cost dummies.
        rank = min((rank for rank in range(num_ranks) if len(ranks[rank]) < per_rank), key=lambda rank: load[rank])
        ranks[rank].append(tuple(sorted(index for unit in one.units for index in unit)))
        load[rank] += one.cost
    return [[*mine, *[()] * (per_rank - len(mine))] for mine in ranks]


def units_for(
    group_of: Sequence[int], lengths: Sequence[int], *, budget: int, pad_rows: bool
) -> list[tuple[int, ...]] | None:
    """The groups as units if each of them fits the budget, else None (then every sequence is a unit)."""
    groups: dict[int, list[int]] = {}
    for index, group in enumerate(group_of):
        groups.setdefault(group, []).append(index)
    units = [tuple(members) for _, members in sorted(groups.items())]
    fits = all(_cost(lengths, [unit], pad_rows=pad_rows) <= budget for unit in units)
    return units if fits else None


def _cost(lengths: Sequence[int], units: Sequence[Unit], *, pad_rows: bool) -> int:
    sizes = [lengths[index] for unit in units for index in unit]
    return len(sizes) * max(sizes, default=0) if pad_rows else sum(sizes)


def _order(one: _Bin) -> tuple[int, int]:
    """Costly first; equal ones by their first sequence, so that the plan is the same everywhere."""
    return -one.cost, min(index for unit in one.units for index in unit)


def _first_fit(lengths: Sequence[int], units: list[Unit], *, budget: int, pad_rows: bool) -> list[_Bin]:
    """First fit, longest first; with `pad_rows` by longest row, so that the rows of a bin are alike."""

    def size(unit: Unit) -> int:
        sizes = [lengths[index] for index in unit]
        return max(sizes) if pad_rows else sum(sizes)

    bins: list[list[Unit]] = []
    rows, longest, total = (np.zeros(len(units), dtype=np.int64) for _ in range(3))
    for unit in sorted((unit for unit in units if unit), key=lambda unit: (-size(unit), min(unit))):
        sizes = [lengths[index] for index in unit]
        open_bins = slice(len(bins))
        if pad_rows:
            costs = (rows[open_bins] + len(unit)) * np.maximum(longest[open_bins], max(sizes))
        else:
            costs = total[open_bins] + sum(sizes)
        fitting = np.flatnonzero(costs <= budget)
        place = int(fitting[0]) if fitting.size else len(bins)
        if place == len(bins):
            bins.append([])
        bins[place].append(unit)
        rows[place] += len(unit)
        longest[place] = max(longest[place], max(sizes))
        total[place] += sum(sizes)
    return [_Bin(tuple(one), _cost(lengths, one, pad_rows=pad_rows)) for one in bins]


def _split(lengths: Sequence[int], bins: list[_Bin], wanted: int, *, pad_rows: bool) -> list[_Bin]:
    """Halve the costliest bins of several units until there are `wanted`: work takes the place of dummies."""
    bins = list(bins)
    while len(bins) < wanted:
        several = [one for one in bins if len(one.units) > 1]
        if not several:
            break
        one = min(several, key=_order)
        left, right = _halve(lengths, one.units, pad_rows=pad_rows)
        bins.remove(one)
        bins += [_Bin(part, _cost(lengths, part, pad_rows=pad_rows)) for part in (left, right)]
    return bins


def _halve(lengths: Sequence[int], units: tuple[Unit, ...], *, pad_rows: bool) -> tuple[tuple[Unit, ...], ...]:
    """Cut where the costlier half costs least; the units' order keeps rows alike."""
    sizes = [[lengths[index] for index in unit] for unit in units]

    def costs_up_to(order: list[list[int]]) -> np.ndarray:
        if not pad_rows:
            return np.cumsum([sum(one) for one in order])
        return np.cumsum([len(one) for one in order]) * np.maximum.accumulate([max(one) for one in order])

    worse = np.maximum(costs_up_to(sizes)[:-1], costs_up_to(sizes[::-1])[::-1][1:])
    cut = int(np.argmin(worse)) + 1
    return units[:cut], units[cut:]
