"""Sequences laid end to end as a model sees them; the only code that shifts targets.

Axes: T token positions of a micro-batch, N its scored tokens, B its sequences.
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


def pack(sequences: Seq[Sequence], members: Seq[int], *, pad_rows: bool = False, multiple_of: int = 1) -> MicroBatch:
    """Lay `sequences[m] for m in members` end to end.

    pad_rows: every slot is as long as the longest (packing off). multiple_of: the total is padded up to it
    (sequence parallelism). No members gives a dummy that computes and scores nothing.
    """
    chosen = [sequences[member] for member in members]
    longest = max((len(one) for one in chosen), default=0) if pad_rows else 0
    slots = [max(longest, len(one)) for one in chosen]
    tail = -sum(slots) % multiple_of if slots else multiple_of
    if tail:
        slots.append(tail)
    ends = np.cumsum([0, *slots])
    tokens = np.zeros(ends[-1], dtype=np.int64)
    scored, owners = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for place, one in enumerate(chosen):
        first = ends[place] + len(one.prompt_ids)
        tokens[ends[place] : first] = one.prompt_ids
        tokens[first : first + len(one.response.ids)] = one.response.ids
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
        members=tuple(members),
        num_real=sum(len(one) for one in chosen),
    )
