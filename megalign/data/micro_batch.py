"""Pack sequences end to end into micro-batches; the only code that shifts targets.

Axes: T token positions of a micro-batch, N its scored tokens; L and M are the subsets of T and N of one context rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megalign.data.group import TokenSequence


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Holds packed sequences with their scored positions and targets, on the CPU until an engine moves them.

    Padding comes after the real tokens of a sequence's slot in `cu_seqlens`, or is a slot of its own at the end, so
    with causal attention it affects no real token.
    """

    token_T: Tensor  # int64
    position_T: Tensor  # int64, from 0 in each slot
    cu_seqlens: Tensor  # int32 [slots + 1]
    scored_N: Tensor  # int64, position in T that predicts the scored token
    target_N: Tensor  # int64, the scored token
    seq_N: Tensor  # int64, index of the token's sequence in `members`
    real_T: Tensor  # bool, False at padding
    members: tuple[int, ...]  # indices of the sequences in the global batch; empty for a dummy

    @property
    def num_positions(self) -> int:
        """Return the number of token positions, padding included."""
        return self.token_T.numel()

    @property
    def length_T(self) -> Tensor:
        """Return for each position the length of its sequence without padding (int64)."""
        counted = torch.cat((torch.zeros(1, dtype=torch.int64), self.real_T.cumsum(0)))[self.cu_seqlens.long()]
        return counted.diff().repeat_interleave(self.cu_seqlens.diff())


@dataclass(frozen=True, slots=True)
class ContextPart:
    """Holds the positions and targets of a micro-batch that one context-parallel rank computes, in ascending order."""

    token_L: Tensor  # int64
    position_L: Tensor  # int64
    length_L: Tensor  # int64
    real_L: Tensor  # bool
    scored_M: Tensor  # int64, position in L
    index_M: Tensor  # int64, index of the scored token in N
    target_M: Tensor  # int64


def slot_sizes(lengths: Sequence[int], *, pad_rows: bool, multiple_of: int, slot_multiple_of: int) -> list[int]:
    """Return the padded length of each slot, plus a last slot that fills the total up to `multiple_of`."""
    longest = max(lengths, default=0) if pad_rows else 0
    slots = [-(-max(longest, length) // slot_multiple_of) * slot_multiple_of for length in lengths]
    tail = -sum(slots) % multiple_of if slots else multiple_of
    return [*slots, tail] if tail else slots


def pack(
    sequences: Sequence[TokenSequence],
    members: Sequence[int],
    *,
    pad_rows: bool = False,
    multiple_of: int = 1,
    slot_multiple_of: int = 1,
) -> MicroBatch:
    """Return a micro-batch of `sequences[m] for m in members`, laid end to end.

    pad_rows: pad every slot to the longest sequence (packing off). slot_multiple_of: pad every slot to a multiple of
    it (context parallelism). multiple_of: pad the total to a multiple of it (sequence parallelism); itself a multiple
    of `slot_multiple_of`. Without members the result is a dummy that scores no token.
    """
    chosen = [sequences[member] for member in members]
    slots = slot_sizes(
        [len(sequence) for sequence in chosen],
        pad_rows=pad_rows,
        multiple_of=multiple_of,
        slot_multiple_of=slot_multiple_of,
    )
    ends = np.cumsum([0, *slots])
    tokens, real = np.zeros(ends[-1], dtype=np.int64), np.zeros(ends[-1], dtype=bool)
    scored, owners = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for index, sequence in enumerate(chosen):
        first = ends[index] + len(sequence.prompt_ids)
        tokens[ends[index] : first] = sequence.prompt_ids
        tokens[first : first + len(sequence.response.ids)] = sequence.response.ids
        real[ends[index] : ends[index] + len(sequence)] = True
        mask = sequence.response.scored
        kept = np.arange(len(sequence.response.ids)) if mask is None else np.flatnonzero(mask)
        scored.append(first + kept)
        owners.append(np.full(len(kept), index))
    target = np.concatenate(scored)
    return MicroBatch(
        token_T=torch.from_numpy(tokens),
        position_T=torch.from_numpy(np.arange(ends[-1]) - np.repeat(ends[:-1], slots)),
        cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
        # The position before a token predicts it: the only shift in the project.
        scored_N=torch.from_numpy(target - 1),
        target_N=torch.from_numpy(tokens[target]),
        seq_N=torch.from_numpy(np.concatenate(owners)),
        real_T=torch.from_numpy(real),
        members=tuple(members),
    )


def context_part(batch: MicroBatch, rank: int, size: int) -> ContextPart:
    """Split each slot into 2 x size chunks and return the rank's chunk and its mirror image.

    Causal attention then costs every rank the same (the zigzag of ring attention, arXiv 2311.09431).
    """
    if size == 1:
        return contiguous_part(batch, rank, size)
    run_T = batch.position_T // (batch.cu_seqlens.diff() // (2 * size)).repeat_interleave(batch.cu_seqlens.diff())
    return _part(batch, (run_T == rank) | (run_T == 2 * size - 1 - rank))


def contiguous_part(batch: MicroBatch, rank: int, size: int) -> ContextPart:
    """Split the row, slots or not, into `size` equal parts and return the rank's one.

    The row's length is a multiple of `size`. Attention that trades parts for heads needs no more (Ulysses, arXiv
    2309.14509).
    """
    if size == 1:
        indices = torch.arange(len(batch.scored_N))
        return ContextPart(
            batch.token_T, batch.position_T, batch.length_T, batch.real_T, batch.scored_N, indices, batch.target_N
        )
    return _part(batch, torch.arange(batch.num_positions) // (batch.num_positions // size) == rank)


def _part(batch: MicroBatch, mine_T: Tensor) -> ContextPart:
    index_M = mine_T[batch.scored_N].nonzero().squeeze(1)
    return ContextPart(
        token_L=batch.token_T[mine_T],
        position_L=batch.position_T[mine_T],
        length_L=batch.length_T[mine_T],
        real_L=batch.real_T[mine_T],
        scored_M=(mine_T.cumsum(0) - 1)[batch.scored_N[index_M]],
        index_M=index_M,
        target_M=batch.target_N[index_M],
    )
