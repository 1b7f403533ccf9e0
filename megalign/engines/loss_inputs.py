"""Builds the tensors that a loss reads, for a step's global batch or for one of its micro-batches.

Axes: S sequences, T scored tokens, N scored tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalign.data.group import TokenSequence
from megalign.engines.scoring import Scored
from megalign.losses.base import Scores


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Holds a step's global batch, the same on every rank, with the scores computed before the step."""

    sequences: Sequence[TokenSequence]
    num_groups: int
    reference: Sequence[Scored] | None = None
    old: Sequence[Scored] | None = None
    current: Sequence[Scored] | None = None  # under the current weights, log-probs and log-sum-exps by token
    on_policy: bool = False  # sampled by the current weights: `old` is None, detached policy log-probs are used


def batch_scores(batch: StepBatch) -> Scores:
    """Return the loss's inputs for the whole global batch; `policy_S` is zeros until `Scores.with_sums`."""
    sequences = batch.sequences
    rewards = [sequence.response.reward for sequence in sequences]
    teachers = [sequence.teacher_score for sequence in sequences]

    def column(values: Sequence[float | None]) -> Tensor | None:
        if all(value is None for value in values):
            return None
        return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float64)

    return Scores(
        policy_S=torch.zeros(len(sequences), dtype=torch.float64),
        group_S=torch.tensor([sequence.group for sequence in sequences]),
        length_S=torch.tensor([sequence.num_scored for sequence in sequences]),
        role_S=tuple(sequence.role for sequence in sequences),
        num_groups=batch.num_groups,
        num_sequences=len(sequences),
        num_tokens=sum(sequence.num_scored for sequence in sequences),
        reference_S=None if batch.reference is None else column([each.total for each in batch.reference]),
        old_S=None if batch.old is None else column([each.total for each in batch.old]),
        reward_S=column(rewards),
        teacher_S=column(teachers),
    )


def step_tokens(scores: Scores, batch: StepBatch, members: Sequence[int], policy_T: Tensor) -> Scores:
    """Set the token-level fields of `scores`, which has the rows of `members`; policy_T: their log-probs."""
    reference = batch.reference
    return scores.with_tokens(
        policy_T,
        old_T=_old_tokens(batch, members, policy_T),
        reference_T=None if reference is None else cat_tokens(reference[member].logp_N for member in members),
    )


def _old_tokens(batch: StepBatch, members: Sequence[int], policy_T: Tensor) -> Tensor | None:
    if batch.on_policy:
        return policy_T.detach()
    return None if batch.old is None else cat_tokens(batch.old[member].logp_N for member in members)


def cat_tokens(values: Iterable[Tensor | None]) -> Tensor:
    """Concatenate the sequences' values by token; RuntimeError where scoring did not keep them."""
    parts = [torch.zeros(0)]
    for value_N in values:
        if value_N is None:
            raise RuntimeError("token log-probs were not kept for a loss that needs them")
        parts.append(value_N)
    return torch.cat(parts)
