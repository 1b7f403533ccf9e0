"""RLOO: each response against the mean of its group's others. Axes: S sequences."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat
from torch import Tensor

from megalign.data.group import Pairing
from megalign.losses.base import LossConfig, LossOut, Scores, Traits, loss
from megalign.losses.clipping import clipped_loss
from megalign.losses.group_means import center_rewards


class RlooConfig(LossConfig):
    name: Literal["rloo"] = "rloo"
    beta: NonNegativeFloat = 0.05
    """Weight of log old policy - log reference, taken off the reward; 0 needs no reference."""
    clip: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Distance from 1 at which the ratio of a whole response is clipped."""

    def traits(self) -> Traits:
        penalty = self.beta != 0
        return Traits(Pairing("samples"), reference=penalty, old=True, old_in_advantages=penalty, entropy=True)


def rloo_advantages(scores: Scores, cfg: RlooConfig) -> Tensor:
    """Return float64 [S]: penalised reward less the mean over the others of its group."""
    assert scores.reward_S is not None
    reward_S = scores.reward_S
    if cfg.beta:
        assert scores.old_S is not None and scores.reference_S is not None
        reward_S = reward_S - cfg.beta * (scores.old_S - scores.reference_S)
    size_S = scores.sizes()
    # r - (sum - r) / (k - 1) = (r - mean) k / (k - 1), without the cancellation in sum - r.
    return center_rewards(reward_S, scores.group_S, scores.num_groups) * size_S / (size_S - 1)


@loss(RlooConfig, prepare=rloo_advantages)
def rloo(scores: Scores, cfg: RlooConfig) -> LossOut:
    """Return the clipped surrogate of whole sequences, mean over a group's responses, then over groups.

    Metrics: clip_fraction is of sequences; kl, where a reference is used, is the mean of old - reference in nats a
    sequence, which estimates KL(old, reference) because old sampled the responses.
    """
    assert scores.old_S is not None and scores.reward_S is not None
    advantage_S = rloo_advantages(scores, cfg) if scores.advantage_S is None else scores.advantage_S
    loss_S, clipped_S = clipped_loss(scores.policy_S - scores.old_S, advantage_S, low=cfg.clip, high=cfg.clip)
    metrics = {
        "reward_mean": scores.reward_S.mean(),
        "advantage_sq": advantage_S.square().mean(),
        "clip_fraction": clipped_S.double().mean(),
    }
    if cfg.beta:
        assert scores.reference_S is not None
        metrics["kl"] = (scores.old_S - scores.reference_S).mean()
    return LossOut((loss_S / scores.sizes()).sum() / scores.num_groups, metrics)
