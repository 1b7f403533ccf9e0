"""EPA, Energy Preference Alignment (arXiv 2412.13862). Axes: S sequences, P those that are positive (one a group)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from megalign.data.group import Pairing
from megalign.losses.base import LossConfig, LossOut, Scores, Traits, loss
from megalign.losses.group_means import group_logsumexp, group_sum, implicit_reward_fit, reward_mean


class EpaConfig(LossConfig):
    name: Literal["epa"] = "epa"
    beta: PositiveFloat = 0.1
    """Scale of the implicit reward (beta x log-ratio to the reference); larger keeps the policy nearer to the
    reference."""
    strong: PositiveInt = 1
    """Number of worse responses to the same prompt that the positive is contrasted with."""
    weak: NonNegativeInt = 2
    """Number of responses of other prompts that it is contrasted with; each costs a forward and backward pass."""
    strong_from: Literal["lowest", "random", "all"] = "lowest"
    """Choice among the worse responses: those with the lowest reward, random ones, or all."""
    weak_from: Literal["any", "positives"] = "any"
    """Responses of other prompts to draw from: any, or only their positives."""

    def traits(self) -> Traits:
        pairing = Pairing("contrast", self.strong, self.weak, self.strong_from, self.weak_from)
        return Traits(pairing, coupled=True, reference=True)


@loss(EpaConfig)
def epa(scores: Scores, cfg: EpaConfig) -> LossOut:
    """Return the mean over groups of -log of the positive's share among exponentials of implicit rewards."""
    assert scores.reference_S is not None
    implicit_S = cfg.beta * (scores.policy_S - scores.reference_S)
    positive_S = scores.of_role("positive")
    total_P = group_logsumexp(implicit_S, scores.group_S, scores.num_groups)[positive_S]
    loss_P = total_P - implicit_S[positive_S]
    metrics = {"p_positive": (-loss_P.detach()).exp().mean(), **_metrics(scores, implicit_S.detach())}
    return LossOut(loss_P.sum() / scores.num_groups, metrics)


def _metrics(scores: Scores, implicit_S: Tensor) -> dict[str, Tensor]:
    """Return the mean implicit reward by role, the share of negatives below it, and the fit to true rewards."""
    metrics = {}
    positive_S, weak_S = scores.of_role("positive"), scores.of_role("weak")
    of_positive_S = group_sum(implicit_S.where(positive_S, 0), scores.group_S, scores.num_groups)
    for role in ("positive", "strong", "weak"):
        role_S = scores.of_role(role)
        if not role_S.any():
            continue
        metrics[f"implicit_reward_{role}"] = implicit_S[role_S].mean()
        if role != "positive":
            metrics[f"accuracy_{role}"] = (of_positive_S > implicit_S)[role_S].double().mean()
    if scores.reward_S is not None:
        # A weak negative's reward, where it has one, is for another prompt.
        reward_S = scores.reward_S.masked_fill(weak_S, torch.nan)
        metrics |= reward_mean(reward_S)
        metrics |= implicit_reward_fit(implicit_S, reward_S, scores.group_S, scores.num_groups)
    return metrics
