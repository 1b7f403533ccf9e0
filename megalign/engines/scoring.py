"""A global batch cut into one rank's micro-batches, and every sequence's score under an engine's weights.

Axes: S sequences of the global batch, N scored tokens of a micro-batch, T scored tokens of the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalign.data.batch import MicroBatch, pack, slot_sizes
from megalign.data.group import Sequence as FlatSequence
from megalign.data.plan import plan, units_for
from megalign.engines.engine import Scorer
from megalign.ops.segments import segment_sum


@dataclass(frozen=True, slots=True)
class Scored:
    """A sequence's score under some weights: float64 sum over scored tokens; by token, fp32 on the CPU, where kept."""

    total: float
    logp_N: Tensor | None = None
    lse_N: Tensor | None = None
    entropy: float | None = None  # sum over scored tokens, where asked for
    num_correct: float | None = None  # likewise, tokens that no other is likelier than


@dataclass(frozen=True, slots=True)
class Cutting:
    """How a global batch is cut into micro-batches."""

    budget: int  # token positions of a micro-batch
    packing: bool = True


@dataclass(frozen=True, slots=True)
class Cut:
    """Micro-batches of one rank, and what the whole job computes."""

    batches: list[MicroBatch]
    whole_groups: bool
    padding_fraction: float


def cut_batch(engine: Scorer, sequences: Sequence[FlatSequence], *, coupled: bool, cutting: Cutting) -> Cut:
    """This rank's micro-batches; groups stay whole where the loss couples them and every one of them fits."""
    lengths = [len(sequence) for sequence in sequences]
    pad_rows = not cutting.packing
    units: Sequence[Sequence[int]] | None = None
    if coupled:
        group_of = [sequence.group for sequence in sequences]
        units = units_for(group_of, lengths, budget=cutting.budget, pad_rows=pad_rows)
    whole = units is not None
    shape = engine.cut
    ranks = plan(
        lengths,
        units if units is not None else [(place,) for place in range(len(sequences))],
        num_ranks=shape.data_size,
        budget=cutting.budget,
        pad_rows=pad_rows,
        min_per_rank=shape.min_per_rank,
        attention_cost=shape.attention_cost,
        slot_multiple_of=shape.slot_multiple_of,
    )
    row, slot = shape.multiple_of, shape.slot_multiple_of
    positions = 0
    for members in (one for rank in ranks for one in rank):
        sizes = [lengths[place] for place in members]
        positions += sum(slot_sizes(sizes, pad_rows=pad_rows, multiple_of=row, slot_multiple_of=slot))
    batches = [
        pack(sequences, members, pad_rows=pad_rows, multiple_of=row, slot_multiple_of=slot)
        for members in ranks[shape.data_rank]
    ]
    return Cut(batches, whole, 1 - sum(lengths) / positions)


def score(
    engine: Scorer,
    sequences: Sequence[FlatSequence],
    *,
    coupled: bool,
    cutting: Cutting,
    by_token: bool,
    entropy: bool = False,
    accuracy: bool = False,
) -> list[Scored]:
    """Every sequence's score under the engine's weights, on every rank; no gradient."""
    cut = cut_batch(engine, sequences, coupled=coupled, cutting=cutting)
    outputs = engine.forward(cut.batches, entropy=entropy, accuracy=accuracy)
    sizes = [sequence.num_scored for sequence in sequences]
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    sum_3S = torch.zeros((3, len(sequences)), dtype=torch.float64)  # log-prob, entropy, correct
    token_2T = torch.zeros((2, starts[-1]) if by_token else (2, 0))
    for batch, found in zip(cut.batches, outputs, strict=False):
        logp_N, lse_N = found.logp_N.cpu(), found.lse_N.cpu()
        for row_S, value_N in zip(sum_3S, (logp_N, found.entropy_N, found.correct_N), strict=True):
            if value_N is not None:
                row_S[list(batch.members)] = segment_sum(value_N.cpu(), batch.seq_N, len(batch.members))
        first = 0
        for place in batch.members if by_token else ():
            last = first + sizes[place]
            token_2T[:, starts[place] : starts[place + 1]] = torch.stack((logp_N[first:last], lse_N[first:last]))
            first = last
    total_S, entropy_S, correct_S = engine.sum_over_data(sum_3S).tolist()
    if by_token:
        token_2T = engine.sum_over_data(token_2T)
    return [
        Scored(
            total_S[place],
            token_2T[0, start:end] if by_token else None,
            token_2T[1, start:end] if by_token else None,
            entropy_S[place] if entropy else None,
            correct_S[place] if accuracy else None,
        )
        for place, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True))
    ]
