"""Computes means over tokens to report beside a loss: entropy, accuracy, distance to the sampler's log-probs.

Axes: S sequences, N scored tokens of a micro-batch, T scored tokens of several sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megalign.data.group import TokenSequence
from megalign.engines.scoring import Scored
from megalign.losses.base import Traits
from megalign.ops.linear_logp import TokenLogp


def measured_sums(output: TokenLogp) -> dict[str, Tensor]:
    """Sum entropy and accuracy over a micro-batch's tokens, by the metric's name, as far as they were computed.

    The sums, float64 [], stay on the tokens' device.
    """
    measured = {"entropy": output.entropy_N, "token_accuracy": output.correct_N}
    return {name: value_N.detach().double().sum() for name, value_N in measured.items() if value_N is not None}


def scored_sums(scored: Sequence[Scored], traits: Traits) -> dict[str, float]:
    """Sum entropy and accuracy over scored sequences, where the traits report them and every sequence has them."""
    columns = {"entropy": [each.entropy for each in scored]} if traits.entropy else {}
    columns |= {"token_accuracy": [each.num_correct for each in scored]} if traits.accuracy else {}
    known = {name: [value for value in column if value is not None] for name, column in columns.items()}
    return {name: sum(values) for name, values in known.items() if len(values) == len(scored)}


def token_means(sums: Mapping[str, float], num_tokens: int) -> dict[str, float]:
    """Divide sums over tokens by the global batch's number of scored tokens."""
    return {name: value / num_tokens for name, value in sums.items()}


def mismatch(sequences: Sequence[TokenSequence], logp_T: Tensor) -> tuple[float, float]:
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


def mismatch_metrics(sequences: Sequence[TokenSequence], total: float, largest: float) -> dict[str, float]:
    """Return metrics of |engine - sampler log-prob|, in nats a token: mean, maximum; {} without sampler log-probs."""
    count = sum(sequence.num_scored for sequence in sequences if sequence.response.behaviour_logp is not None)
    return {"rollout_mismatch": total / count, "rollout_mismatch_max": largest} if count else {}
