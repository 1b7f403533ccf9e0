"""Pack sequences end to end into micro-batches; the only code that shifts targets.

Axes: T token positions of a micro-batch, N its scored tokens; L and M those of them that one context rank computes.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megalign.data.group import Sequence


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Packed sequences with their scored positions and targets. Tensors are on the CPU until an engine moves them.

    Alignment and row padding belong to a sequence's slot in `cu_seqlens` (or to a slot of its own at the end)
    and come after its real tokens, so causal attention never lets them touch a number.
    """

    token_T: Tensor  # int64
    position_T: Tensor  # int64, from 0 in each slot
    cu_seqlens: Tensor  # int32 [slots + 1]
    scored_N: Tensor  # int64, position in T whose next token is scored
    target_N: Tensor  # int64, that next token
    seq_N: Tensor  # int64, the token's sequence, from 0 in `members`
    real_T: Tensor  # bool, whether the position holds a token of a sequence
    members: tuple[int, ...]  # the sequences' places in the step's global batch; empty for a dummy

    @property
    def num_positions(self) -> int:
        return self.token_T.numel()

    @property
    def length_T(self) -> Tensor:
        """For each position, the length of its sequence (int64)."""
        counted = torch.cat((torch.zeros(1, dtype=torch.int64), self.real_T.cumsum(0)))[self.cu_seqlens.long()]
        return counted.diff().repeat_interleave(self.cu_seqlens.diff())


@dataclass(frozen=True, slots=True)
class ContextPart:
    """The positions and targets of a micro-batch that one context-parallel rank computes, in the row's order."""

    token_L: Tensor  # int64
    position_L: Tensor  # int64
    length_L: Tensor  # int64
    real_L: Tensor  # bool
    scored_M: Tensor  # int64, position in L
    place_M: Tensor  # int64, the token's place among all N scored ones
    target_M: Tensor  # int64


def slot_sizes(lengths: Seq[int], *, pad_rows: bool, multiple_of: int, slot_multiple_of: int) -> list[int]:
    """Return the padded length of each sequence's slot, and of a last slot that fills the row to `multiple_of`."""
    longest = max(lengths, default=0) if pad_rows else 0
    slots = [-(-max(longest, length) // slot_multiple_of) * slot_multiple_of for length in lengths]
    tail = -sum(slots) % multiple_of if slots else multiple_of
    return [*slots, tail] if tail else slots


def pack(
    sequences: Seq[Sequence],
    members: Seq[int],
    *,
    pad_rows: bool = False,
    multiple_of: int = 1,
    slot_multiple_of: int = 1,
) -> MicroBatch:
    """Lay `sequences[m] for m in members` end to end.

    pad_rows: every slot is as long as the longest (packing off). multiple_of: the total is padded up to it (sequence
    parallelism), a multiple of `slot_multiple_of`, up to which every slot is padded (context parallelism). No members
    gives a dummy that computes and scores nothing.
    """
    chosen = [sequences[member] for member in members]
    slots = slot_sizes(
        [len(one) for one in chosen], pad_rows=pad_rows, multiple_of=multiple_of, slot_multiple_of=slot_multiple_of
    )
    ends = np.cumsum([0, *slots])
    tokens, real = np.zeros(ends[-1], dtype=np.int64), np.zeros(ends[-1], dtype=bool)
    scored, owners = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for place, one in enumerate(chosen):
        first = ends[place] + len(one.prompt_ids)
        tokens[ends[place] : first] = one.prompt_ids
        tokens[first : first + len(one.response.ids)] = one.response.ids
        real[ends[place] : ends[place] + len(one)] = True
        mask = one.response.scored
        kept = np.arange(len(one.response.ids)) if mask is None else np.flatnonzero(mask)
        scored.append(first + kept)
        owners.append(np.full(len(kept), place))
    target = np.concatenate(scored)
    return MicroBatch(
        token_T=torch.from_numpy(tokens),
        position_T=torch.from_numpy(np.arange(ends[-1]) - np.repeat(ends[:-1], slots)),
        cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
        # The position before a token predicts it: the one shift in the project.
        scored_N=torch.from_numpy(target - 1),
        target_N=torch.from_numpy(tokens[target]),
        seq_N=torch.from_numpy(np.concatenate(owners)),
        real_T=torch.from_numpy(real),
        members=tuple(members),
    )


def context_part(batch: MicroBatch, rank: int, size: int) -> ContextPart:
    """Cut each slot into 2 x size chunks and return the rank's chunk and its mirror image.

    Causal attention then costs every rank the same (the zigzag of ring attention, arXiv 2311.09431).
    """
    if size == 1:
        places = torch.arange(len(batch.scored_N))
        return ContextPart(
            batch.token_T, batch.position_T, batch.length_T, batch.real_T, batch.scored_N, places, batch.target_N
        )
    run_T = batch.position_T // (batch.cu_seqlens.diff() // (2 * size)).repeat_interleave(batch.cu_seqlens.diff())
    mine_T = (run_T == rank) | (run_T == 2 * size - 1 - rank)
    place_M = mine_T[batch.scored_N].nonzero().squeeze(1)
    return ContextPart(
        token_L=batch.token_T[mine_T],
        position_L=batch.position_T[mine_T],
        length_L=batch.length_T[mine_T],
        real_L=batch.real_T[mine_T],
        scored_M=(mine_T.cumsum(0) - 1)[batch.scored_N[place_M]],
        place_M=place_M,
        target_M=batch.target_N[place_M],
    )
