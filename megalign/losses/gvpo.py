"""GVPO, Group Variance Policy Optimization (arXiv 2504.19599). Axes: S sequences."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from megalign.data.group import Pairing
from megalign.losses.base import LossConfig, LossOut, Scores, Traits, loss
from megalign.losses.group_means import center_by_group, center_rewards, implicit_reward_fit


class GvpoConfig(LossConfig):
    name: Literal["gvpo"] = "gvpo"
    beta: PositiveFloat = 0.1
    """Scale of the implicit reward (beta x log-ratio to the reference); larger keeps the policy nearer to the
    reference."""

    def traits(self) -> Traits:
        return Traits(Pairing("samples"), coupled=True, reference=True, entropy=True)


@loss(GvpoConfig)
def gvpo(scores: Scores, cfg: GvpoConfig) -> LossOut:
    """Return half the unbiased variance, within a group, of implicit less true reward; mean over groups.

    Metrics: weight_sq is the mean square of the weights on grad s; kl is the mean of s - s' in nats a sequence, which
    estimates KL(policy, reference) without bias for responses the policy itself sampled, and is a plain drift (of
    either sign) for others.
    """
    assert scores.reference_S is not None and scores.reward_S is not None
    ratio_S = scores.policy_S - scores.reference_S
    implicit_S = cfg.beta * ratio_S
    gap_S = center_by_group(implicit_S, scores.group_S, scores.num_groups)
    gap_S = gap_S - center_rewards(scores.reward_S, scores.group_S, scores.num_groups)
    metrics = {
        "reward_mean": scores.reward_S.mean(),
        "kl": ratio_S.detach().mean(),
        "weight_sq": gap_S.detach().square().mean(),
        **implicit_reward_fit(implicit_S, scores.reward_S, scores.group_S, scores.num_groups),
    }
    return LossOut(0.5 * (gap_S.square() / (scores.sizes() - 1)).sum() / scores.num_groups, metrics)
