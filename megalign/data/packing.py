"""Assign sequences to micro-batches and ranks; the assignment never changes the result's numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from megalign.data.group import TokenSequence
from megalign.data.micro_batch import MicroBatch, pack, slot_sizes

Unit = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MicroBatchShape:
    """Describes the micro-batches that one rank of an engine takes."""

    data_rank: int
    data_size: int
    multiple_of: int = 1  # token positions of a micro-batch are padded to a multiple of this
    slot_multiple_of: int = 1  # token positions of each sequence, likewise
    min_per_rank: int = 1  # least number of micro-batches
    attention_cost: float = 0.0  # of a pair of positions, relative to all other work on one position
    pad_rows: bool = False  # the model cannot tell packed sequences apart: pad each to the longest of its micro-batch


@dataclass(frozen=True, slots=True)
class Packing:
    """Sets the size limit of a micro-batch, and whether sequences are packed or padded."""

    budget: int  # most token positions of a micro-batch
    pack: bool = True  # False: pad every sequence to the longest in its micro-batch


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """Holds one rank's micro-batches, and two properties of all ranks' micro-batches."""

    batches: list[MicroBatch]
    whole_groups: bool  # every group lies in a single micro-batch
    padding_fraction: float  # share of padding in all ranks' positions


def micro_batches(
    shape: MicroBatchShape, sequences: Sequence[TokenSequence], *, coupled: bool, packing: Packing
) -> MicroBatches:
    """Pack a global batch into micro-batches and return this rank's.

    coupled: keep each group in one micro-batch if every group fits the budget.
    """
    lengths = [len(sequence) for sequence in sequences]
    pad_rows = shape.pad_rows or not packing.pack
    units: Sequence[Sequence[int]] | None = None
    if coupled:
        group_of = [sequence.group for sequence in sequences]
        units = units_for(group_of, lengths, budget=packing.budget, pad_rows=pad_rows)
    ranks = plan(
        lengths,
        units if units is not None else [(index,) for index in range(len(sequences))],
        num_ranks=shape.data_size,
        budget=packing.budget,
        pad_rows=pad_rows,
        min_per_rank=shape.min_per_rank,
        attention_cost=shape.attention_cost,
        slot_multiple_of=shape.slot_multiple_of,
    )
    row, slot = shape.multiple_of, shape.slot_multiple_of
    positions = 0
    for members in (members for rank in ranks for members in rank):
        sizes = [lengths[index] for index in members]
        positions += sum(slot_sizes(sizes, pad_rows=pad_rows, multiple_of=row, slot_multiple_of=slot))
    batches = [
        pack(sequences, members, pad_rows=pad_rows, multiple_of=row, slot_multiple_of=slot)
        for members in ranks[shape.data_rank]
    ]
    return MicroBatches(batches, units is not None, 1 - sum(lengths) / positions)


class _Bin(NamedTuple):
    """Holds the units that share a micro-batch, in the order in which they were packed."""

    units: tuple[Unit, ...]
    cost: int  # token positions
    work: float  # compute cost, in positions


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
    """Return the sequence indices of each micro-batch of each rank; every rank has the same number of micro-batches.

    A unit (a whole group, or one sequence) is never split; a unit above the budget is a micro-batch of its own. Empty
    micro-batches (dummies) come last. A micro-batch's size is the sum of its lengths, each rounded up to
    `slot_multiple_of`, or with `pad_rows` the number of rows times the longest; its work is the sum of
    n + attention_cost n^2 over lengths n. Work is balanced over ranks, and also over the micro-batches that run at the
    same time, since expert parallelism makes ranks wait for each other in every micro-batch.
    min_per_rank: an interleaved pipeline needs at least as many micro-batches as stages.
    """
    sizes = [-(-length // slot_multiple_of) * slot_multiple_of for length in lengths]
    whole = [tuple(unit) for unit in units if unit]
    make = partial(_bin, sizes, pad_rows=pad_rows, attention_cost=attention_cost)
    bins = [make(group) for group in _first_fit(sizes, whole, budget=budget, pad_rows=pad_rows)]
    per_rank = max(min_per_rank, -(-len(bins) // num_ranks))
    level = None if pad_rows else _level([make((unit,)) for unit in whole], per_rank * num_ranks, budget=budget)
    if level is not None:
        bins = [make(group) for group in level]
    else:
        bins = _split(sizes, bins, per_rank * num_ranks, make, pad_rows=pad_rows)
    ranks = _deal(bins, num_ranks)
    members = [[tuple(sorted(index for unit in bin_.units for index in unit)) for bin_ in mine] for mine in ranks]
    return [[*mine, *[()] * (per_rank - len(mine))] for mine in members]


def _deal(bins: list[_Bin], num_ranks: int) -> list[list[_Bin]]:
    """Return each rank's bins, balanced in number and work: deal heavy bins first, then swap while that helps."""
    bins = sorted(bins, key=_order)
    ranks: list[list[_Bin]] = [[] for _ in range(num_ranks)]
    load = np.zeros(num_ranks)
    for first in range(0, len(bins), num_ranks):
        # Deal the next heaviest bins, one to each rank: the heaviest of them to the rank with the least so far.
        for rank, bin_ in zip(np.argsort(load, kind="stable"), bins[first : first + num_ranks], strict=False):
            ranks[rank].append(bin_)
            load[rank] += bin_.work
    for _ in range(num_ranks * num_ranks):
        most, least = int(np.argmax(load)), int(np.argmin(load))
        gap = load[most] - load[least]
        gain = np.subtract.outer([bin_.work for bin_ in ranks[most]], [bin_.work for bin_ in ranks[least]])
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
    """Return the groups as units if each of them fits the budget, else None (then every sequence is a unit)."""
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


def _order(bin_: _Bin) -> tuple[float, int]:
    """Return the sort key: heavy bins first, ties by first sequence, so that every rank makes the same plan."""
    return -bin_.work, min(index for unit in bin_.units for index in unit)


def _level(units: list[_Bin], count: int, *, budget: int) -> list[list[Unit]] | None:
    """Fill `count` bins, heavy units first, each into the lightest bin with room; None if a unit fits no bin."""
    if len(units) < count:
        return None
    bins: list[list[Unit]] = [[] for _ in range(count)]
    tokens, work = np.zeros(count, dtype=np.int64), np.zeros(count)
    for unit in sorted(units, key=_order):
        index = int(np.argmin(np.where((tokens + unit.cost <= budget) | (tokens == 0), work, np.inf)))
        if bins[index] and tokens[index] + unit.cost > budget:
            return None
        bins[index] += unit.units
        tokens[index] += unit.cost
        work[index] += unit.work
    return bins


def _first_fit(lengths: Sequence[int], units: list[Unit], *, budget: int, pad_rows: bool) -> list[list[Unit]]:
    """Fill bins first fit, longest unit first; with `pad_rows` by longest row, so that rows have similar lengths."""

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
        index = int(fitting[0]) if fitting.size else len(bins)
        if index == len(bins):
            bins.append([])
        bins[index].append(unit)
        rows[index] += len(unit)
        longest[index] = max(longest[index], max(sizes))
        total[index] += sum(sizes)
    return bins


def _split(
    lengths: Sequence[int],
    bins: list[_Bin],
    wanted: int,
    make: Callable[[Sequence[Unit]], _Bin],
    *,
    pad_rows: bool,
) -> list[_Bin]:
    """Return at least `wanted` bins where possible, by halving the heaviest: real work instead of dummies."""
    bins = list(bins)
    while len(bins) < wanted:
        several = [bin_ for bin_ in bins if len(bin_.units) > 1]
        if not several:
            break
        heaviest = min(several, key=_order)
        bins.remove(heaviest)
        bins += [make(part) for part in _halve(lengths, heaviest.units, pad_rows=pad_rows)]
    return bins


def _halve(lengths: Sequence[int], units: tuple[Unit, ...], *, pad_rows: bool) -> tuple[tuple[Unit, ...], ...]:
    """Return the units in two parts, split where the costlier part is cheapest; their order is kept."""
    sizes = [[lengths[index] for index in unit] for unit in units]

    def costs_up_to(order: list[list[int]]) -> np.ndarray:
        if not pad_rows:
            return np.cumsum([sum(rows) for rows in order])
        return np.cumsum([len(rows) for rows in order]) * np.maximum.accumulate([max(rows) for rows in order])

    worse = np.maximum(costs_up_to(sizes)[:-1], costs_up_to(sizes[::-1])[::-1][1:])
    cut = int(np.argmin(worse)) + 1
    return units[:cut], units[cut:]
