"""Builds the tensors that a loss reads, for a step's global batch or for one of its micro-batches.

Axes: S sequences, T scored tokens, N scored tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megalign.data.group import Sequence as FlatSequence
from megalign.engines.scoring import Scored
from megalign.losses.base import LossConfig, Scores


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A step's global batch, the same on every rank, with the scores computed before the step."""

    sequences: Sequence[FlatSequence]
    num_groups: int
    reference: Sequence[Scored] | None = None
    old: Sequence[Scored] | None = None
    current: Sequence[Scored] | None = None  # under the current weights, log-probs and log-sum-exps by token
    on_policy: bool = False  # sampled by the current weights: `old` is None, detached policy log-probs are used


def batch_scores(batch: StepBatch, loss: LossConfig) -> Scores:
    """Return the loss's inputs for the whole global batch; `policy_S` is zeros until `with_sums`."""
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
        reference_S=None if batch.reference is None else column([one.total for one in batch.reference]),
        old_S=None if batch.old is None else column([one.total for one in batch.old]),
        reward_S=column(rewards),
        teacher_S=column(teachers),
    )


def part_scores(scores: Scores, members: Sequence[int]) -> Scores:
    """Select the rows of `members`; num_groups, num_sequences and num_tokens stay those of the global batch."""
    index = torch.tensor(list(members), dtype=torch.int64)
    by_sequence = ("policy_S", "group_S", "length_S", "reference_S", "old_S", "reward_S", "teacher_S")
    sliced: dict[str, Any] = {}
    for name in (*by_sequence, "group_size_S", "advantage_S"):
        value = getattr(scores, name)
        sliced[name] = None if value is None else value[index]
    return replace(scores, role_S=tuple(scores.role_S[place] for place in members), **sliced)


def with_tokens(scores: Scores, batch: StepBatch, members: Sequence[int], policy_T: Tensor | None) -> Scores:
    """Add the token-level fields of `members`, whose policy log-probs are policy_T; unchanged where that is None."""
    if policy_T is None:
        return scores
    sizes = torch.tensor([batch.sequences[place].num_scored for place in members], dtype=torch.int64)
    return replace(
        scores,
        policy_T=policy_T,
        seq_T=torch.arange(len(sizes)).repeat_interleave(sizes),
        old_T=_old_tokens(batch, members, policy_T),
        reference_T=None if batch.reference is None else cat_tokens([batch.reference[place] for place in members]),
    )


def _old_tokens(batch: StepBatch, members: Sequence[int], policy_T: Tensor) -> Tensor | None:
    if batch.on_policy:
        return policy_T.detach()
    return None if batch.old is None else cat_tokens([batch.old[place] for place in members])


def with_sums(scores: Scores, batch: StepBatch, policy_S: Tensor) -> Scores:
    """Set policy_S, and on policy old_S to the same values, detached."""
    old_S = policy_S.detach() if batch.on_policy else scores.old_S
    return replace(scores, policy_S=policy_S, old_S=old_S)


def cat_tokens(scored: Sequence[Scored]) -> Tensor:
    return torch.cat([torch.zeros(0), *(need(one.logp_N) for one in scored)])


def need(value: Tensor | None) -> Tensor:
    if value is None:
        raise RuntimeError("token log-probs were not kept for a loss that needs them")
    return value


def mismatch(sequences: Sequence[FlatSequence], logp_T: Tensor) -> tuple[float, float]:
    """Return (sum, maximum) over tokens of |log-prob - behaviour log-prob|; responses without it add nothing."""
    total, largest, first = 0.0, 0.0, 0
    for sequence in sequences:
        last = first + sequence.num_scored
        behaviour = sequence.response.scored_behaviour_logp
        if behaviour:
            gap_T = (logp_T[first:last].double() - torch.tensor(behaviour, dtype=torch.float64)).abs()
            total, largest = total + float(gap_T.sum()), max(largest, float(gap_T.max()))
        first = last
    return total, largest


def mismatch_metrics(sequences: Sequence[FlatSequence], total: float, largest: float) -> dict[str, float]:
    """Return metrics of |engine - sampler log-prob|, in nats a token: mean, maximum; {} without sampler log-probs."""
    count = sum(one.num_scored for one in sequences if one.response.behaviour_logp is not None)
    return {"rollout_mismatch": total / count, "rollout_mismatch_max": largest} if count else {}
