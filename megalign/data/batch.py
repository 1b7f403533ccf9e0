"""Sequences laid end to end as a model sees them; the only code that shifts targets.

Axes: T token positions of a micro-batch, N its scored tokens, B its sequences.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from megalign.data.group import Sequence


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Whole sequences end to end. All tensors are on the CPU until an engine moves them.

    Alignment and row padding belong to a sequence's slot in `cu_seqlens` (or to a slot of its own at the end)
    and come after its real tokens, so causal attention never lets them touch a number.
    """

    token_T: Tensor  # int64
    position_T: Tensor  # int64, from 0 in each slot
    cu_seqlens: Tensor  # int32 [slots + 1]
    scored_N: Tensor  # int64, position in T whose next token is scored
    target_N: Tensor  # int64, that next token
    seq_N: Tensor  # int64, the token's sequence, from 0 in `members`
    members: tuple[int, ...]  # the sequences' places in the step's global batch; empty for a dummy
    num_real: int  # token positions that hold a real token

    @property
    def num_positions(self) -> int:
        return self.token_T.numel()


def pack(
    sequences: Seq[Sequence], members: Seq[int], *, pad_rows: bool = False, multiple_of: int = 1
) -> MicroBatch:
    """Lay `sequences[m] for m in members` end to end.

    pad_rows: every slot is as long as the longest (packing off). multiple_of: the total is padded up to it
    (sequence parallelism). No members gives a dummy that computes and scores nothing.
    """
    chosen = [sequences[member] for member in members]
    slot_length = max((len(s) for s in chosen), default=0) if pad_rows else 0
    tokens: list[int] = []
    positions: list[int] = []
    ends = [0]
    scored: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for place, sequence in enumerate(chosen):
        start, ids = len(tokens), sequence.prompt_ids + sequence.response.ids
        first = len(sequence.prompt_ids)
        mask = sequence.response.scored
        for offset in range(len(sequence.response.ids)):
            if mask is None or mask[offset]:
                # The position before a token predicts it: the one shift in the project.
                scored.append(start + first + offset - 1)
                targets.append(sequence.response.ids[offset])
                owners.append(place)
        length = max(slot_length, len(ids))
        tokens.extend(ids)
        tokens.extend([0] * (length - len(ids)))
        positions.extend(range(length))
        ends.append(len(tokens))
    tail = -len(tokens) % multiple_of if tokens else multiple_of
    if tail:
        tokens.extend([0] * tail)
        positions.extend(range(tail))
        ends.append(len(tokens))
    return MicroBatch(
        token_T=torch.tensor(tokens),
        position_T=torch.tensor(positions),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        scored_N=torch.tensor(scored, dtype=torch.int64),
        target_N=torch.tensor(targets, dtype=torch.int64),
        seq_N=torch.tensor(owners, dtype=torch.int64),
        members=tuple(members),
        num_real=sum(len(s) for s in chosen),
    )
