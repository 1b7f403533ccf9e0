"""Assign sequences to micro-batches and ranks. No assignment may change a number of the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

Unit = tuple[int, ...]


class _Bin(NamedTuple):
    """Units that share a micro-batch, the costly first."""

    units: tuple[Unit, ...]
    cost: int  # token positions
    work: float  # what they cost to compute, in positions


def plan(
    lengths: Sequence[int],
    units: Sequence[Sequence[int]],
    *,
    num_ranks: int,
    budget: int,
    pad_rows: bool,
    min_per_rank: int = 1,
    attention_cost: float = 0.0,
    slot_multiple_of: int = 1,
) -> list[list[tuple[int, ...]]]:
    """rank -> micro-batches -> sequence indices; every rank gets the same number, empty tuples (dummies) at the end.

    A unit (a whole group, or one sequence) is never split; one above the budget is a micro-batch of its own.
    Tokens are the sum of lengths, each rounded up to `slot_multiple_of`, or with `pad_rows` rows times the longest; a
    length n is the work of n + attention_cost n^2. Ranks get equal work as nearly as their units allow, and so do the
    micro-batches that they run at the same time, since experts make ranks wait for each other in every one.
    min_per_rank: an interleaved pipeline needs as many micro-batches as it has stages.
    """
    sizes = [-(-length // slot_multiple_of) * slot_multiple_of for length in lengths]
    whole = [tuple(unit) for unit in units if unit]
    make = partial(_bin, sizes, pad_rows=pad_rows, attention_cost=attention_cost)
    bins = [make(one) for one in _first_fit(sizes, whole, budget=budget, pad_rows=pad_rows)]
    per_rank = max(min_per_rank, -(-len(bins) // num_ranks))
    level = None if pad_rows else _level([make((unit,)) for unit in whole], per_rank * num_ranks, budget=budget)
    if level is not None:
        bins = [make(one) for one in level]
    else:
        bins = _split(sizes, bins, per_rank * num_ranks, make, pad_rows=pad_rows)
    ranks = _deal(bins, num_ranks)
    members = [[tuple(sorted(index for unit in one.units for index in unit)) for one in mine] for mine in ranks]
    return [[*mine, *[()] * (per_rank - len(mine))] for mine in members]


def _deal(bins: list[_Bin], num_ranks: int) -> list[list[_Bin]]:
    """As many bins to each rank, heavy ones first, with equal work: dealt row by row, then swapped while it helps."""
    bins = sorted(bins, key=_order)
    ranks: list[list[_Bin]] = [[] for _ in range(num_ranks)]
    load = np.zeros(num_ranks)
    for first in range(0, len(bins), num_ranks):
        # The next heaviest of all, one to each rank: the heaviest of them to the rank with the least so far.
        for rank, one in zip(np.argsort(load, kind="stable"), bins[first : first + num_ranks], strict=False):
            ranks[rank].append(one)
            load[rank] += one.work
    for _ in range(num_ranks * num_ranks):
        most, least = int(np.argmax(load)), int(np.argmin(load))
        gap = load[most] - load[least]
        gain = np.subtract.outer([one.work for one in ranks[most]], [one.work for one in ranks[least]])
        if not gain.size or not (np.abs(gain - gap / 2) < gap / 2 * (1 - 1e-9)).any():
            break
        mine, theirs = np.unravel_index(np.argmin(np.abs(gain - gap / 2)), gain.shape)
        ranks[most][mine], ranks[least][theirs] = ranks[least][theirs], ranks[most][mine]
        load[most] -= gain[mine, theirs]
        load[least] += gain[mine, theirs]
    return [sorted(mine, key=_order) for mine in ranks]


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


def _bin(sizes: Sequence[int], units: Sequence[Unit], *, pad_rows: bool, attention_cost: float) -> _Bin:
    rows = [sizes[index] for unit in units for index in unit]
    if pad_rows:
        rows = [max(rows, default=0)] * len(rows)
    return _Bin(tuple(units), sum(rows), sum(size + attention_cost * size * size for size in rows))


def _order(one: _Bin) -> tuple[float, int]:
    """Heavy first; equal ones by their first sequence, so that the plan is the same everywhere."""
    return -one.work, min(index for unit in one.units for index in unit)


def _level(units: list[_Bin], count: int, *, budget: int) -> list[list[Unit]] | None:
    """`count` bins of equal work where heavy units first, each into the lightest bin with room, leave none over."""
    if len(units) < count:
        return None
    bins: list[list[Unit]] = [[] for _ in range(count)]
    tokens, work = np.zeros(count, dtype=np.int64), np.zeros(count)
    for one in sorted(units, key=_order):
        place = int(np.argmin(np.where((tokens + one.cost <= budget) | (tokens == 0), work, np.inf)))
        if bins[place] and tokens[place] + one.cost > budget:
            return None
        bins[place] += one.units
        tokens[place] += one.cost
        work[place] += one.work
    return bins


def _first_fit(lengths: Sequence[int], units: list[Unit], *, budget: int, pad_rows: bool) -> list[list[Unit]]:
    """First fit, longest first; with `pad_rows` by longest row, so that the rows of a bin are alike."""

    def size(unit: Unit) -> int:
        sizes = [lengths[index] for index in unit]
        return max(sizes) if pad_rows else sum(sizes)

    bins: list[list[Unit]] = []
    rows, longest, total = (np.zeros(len(units), dtype=np.int64) for _ in range(3))
    for unit in sorted(units, key=lambda unit: (-size(unit), min(unit))):
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
    return bins


def _split(
    lengths: Sequence[int],
    bins: list[_Bin],
    wanted: int,
    make: Callable[[Sequence[Unit]], _Bin],
    *,
    pad_rows: bool,
) -> list[_Bin]:
    """Halve the heaviest bins of several units until there are `wanted`: work takes the place of dummies."""
    bins = list(bins)
    while len(bins) < wanted:
        several = [one for one in bins if len(one.units) > 1]
        if not several:
            break
        one = min(several, key=_order)
        bins.remove(one)
        bins += [make(part) for part in _halve(lengths, one.units, pad_rows=pad_rows)]
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
