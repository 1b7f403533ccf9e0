"""The unit of data: one prompt with its responses, and the flat sequences a model scores.

A `Group` is what a record becomes; a `Sequence` is one prompt with one response inside a step's global batch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["response", "chosen", "rejected", "positive", "strong", "weak"]

# Rewards this near, as a fraction of the largest, are one number that was computed in two ways: 0.1 + 0.2 and 0.3.
SAME_REWARD = 8 * sys.float_info.epsilon


def without_rounding(rewards: Seq[float]) -> list[float]:
    """Return a group's rewards; those that differ by rounding alone become the lowest of them."""
    near = SAME_REWARD * max(map(abs, rewards), default=0.0)
    lowest, found = math.nan, [0.0] * len(rewards)
    for place in sorted(range(len(rewards)), key=rewards.__getitem__):
        if not rewards[place] - lowest <= near:
            lowest = rewards[place]
        found[place] = lowest
    return found


def same_rewards(rewards: Seq[float]) -> bool:
    """Return whether a group's rewards are all equal; False for no rewards."""
    return len(set(without_rounding(rewards))) == 1


@dataclass(frozen=True, slots=True)
class Pairing:
    """The kind and number of sequences that a loss takes from a record.

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
    """Token ids that follow a prompt, and what the record says of them."""

    ids: tuple[int, ...]
    reward: float | None = None
    behaviour_logp: tuple[float, ...] | None = None  # log-probs by token of the policy that sampled it
    scored: tuple[bool, ...] | None = None  # which tokens count; None: every one

    @property
    def scored_behaviour_logp(self) -> list[float] | None:
        """Behaviour log-probs of the scored tokens alone."""
        if self.behaviour_logp is None or self.scored is None:
            return None if self.behaviour_logp is None else list(self.behaviour_logp)
        return [logp for logp, counts in zip(self.behaviour_logp, self.scored, strict=True) if counts]


@dataclass(frozen=True, slots=True)
class Group:
    """One record: a prompt, its responses in file order, and for paired formats which is which."""

    record: int  # from 0 in the input
    prompt_ids: tuple[int, ...]
    responses: tuple[Response, ...]
    paired: bool = False  # responses are (chosen, rejected) rather than rewarded samples
    teacher_scores: Mapping[str, float] = field(default_factory=dict)  # mean log-prob by response token
    weak: tuple[tuple[int, int], ...] = ()  # pinned weak negatives: (record, response), both from 0
    raw: Mapping[str, Any] = field(default_factory=dict)  # the record as it was read


@dataclass(frozen=True, slots=True)
class Sequence:
    """One prompt with one response: what a model scores and a step trains on."""

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
        """Number of scored response tokens."""
        return len(self.response.ids) if self.response.scored is None else sum(self.response.scored)
