"""Supervised fine-tuning: token-mean cross-entropy over the global batch. Axes: T scored tokens."""

from __future__ import annotations

from typing import Literal

from megalign.data.group import Pairing
from megalign.losses.base import LossConfig, LossOut, Scores, Traits, loss


class SftConfig(LossConfig):
    name: Literal["sft"] = "sft"

    def traits(self) -> Traits:
        return Traits(Pairing("single"), level="token", linear=True, accuracy=True)


@loss(SftConfig)
def sft(scores: Scores, cfg: SftConfig) -> LossOut:
    """Return the mean negative log-prob by token over all response tokens of the global batch."""
    assert scores.policy_T is not None
    return LossOut(-scores.policy_T.double().sum() / scores.num_tokens)
