"""Define the unit of data, a prompt with its responses, and the flat sequences that a model scores.

A `Group` is a tokenised record; a `TokenSequence` is one prompt with one response inside a step's global batch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["response", "chosen", "rejected", "positive", "strong", "weak"]

# Rewards that differ by less than this fraction of the largest differ by rounding only, such as 0.1 + 0.2 and 0.3.
SAME_REWARD = 8 * sys.float_info.epsilon


def without_rounding(rewards: Sequence[float]) -> list[float]:
    """Return a group's rewards, each set of those that differ only by rounding replaced by its lowest."""
    near = SAME_REWARD * max(map(abs, rewards), default=0.0)
    lowest, result = math.nan, [0.0] * len(rewards)
    for index in sorted(range(len(rewards)), key=rewards.__getitem__):
        if not rewards[index] - lowest <= near:
            lowest = rewards[index]
        result[index] = lowest
    return result


def same_rewards(rewards: Sequence[float]) -> bool:
    """Return whether a group's rewards are all equal; False for no rewards."""
    return len(set(without_rounding(rewards))) == 1


@dataclass(frozen=True, slots=True)
class Pairing:
    """States which sequences of a record a loss takes, and how many.

    single: one response (SFT, PoFT). preference: chosen and rejected (DPO). contrast: one positive, `strong`
    worse responses to the same prompt and `weak` responses of other prompts (EPA). samples: all responses
    with their rewards (GVPO, GRPO, RLOO).
    """

    kind: Literal["single", "preference", "contrast", "samples"]
    strong: int = 0
    weak: int = 0
    strong_from: Literal["lowest", "random", "all"] = "lowest"
    weak_from: Literal["any", "positives"] = "any"


@dataclass(frozen=True, slots=True)
class Response:
    """Holds the token ids that follow a prompt, with the reward and log-probs that the record gives."""

    ids: tuple[int, ...]
    reward: float | None = None
    behaviour_logp: tuple[float, ...] | None = None  # log-prob of each token under the policy that sampled it
    scored: tuple[bool, ...] | None = None  # which tokens the loss counts; None: all

    @property
    def scored_behaviour_logp(self) -> list[float] | None:
        """Return the behaviour log-probs of the scored tokens only."""
        if self.behaviour_logp is None or self.scored is None:
            return None if self.behaviour_logp is None else list(self.behaviour_logp)
        return [logp for logp, counts in zip(self.behaviour_logp, self.scored, strict=True) if counts]


@dataclass(frozen=True, slots=True)
class Group:
    """Holds one tokenised record: a prompt and its responses in file order."""

    record: int  # from 0 in the input
    prompt_ids: tuple[int, ...]
    responses: tuple[Response, ...]
    paired: bool = False  # responses are (chosen, rejected) instead of samples with rewards
    teacher_scores: Mapping[str, float] = field(default_factory=dict)  # mean log-prob by response token
    weak: tuple[tuple[int, int], ...] = ()  # pinned weak negatives: (record, response), both from 0
    raw: Mapping[str, Any] = field(default_factory=dict)  # the record as it was read


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Holds one prompt with one response, as a model scores it and a step trains on it."""

    record: int
    group: int  # from 0 in the step
    role: Role
    prompt_ids: tuple[int, ...]
    response: Response
    teacher_score: float | None = None  # mean over aligned models of their mean token log-prob

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response.ids)

    @property
    def num_scored(self) -> int:
        """Return the number of scored response tokens."""
        return len(self.response.ids) if self.response.scored is None else sum(self.response.scored)
