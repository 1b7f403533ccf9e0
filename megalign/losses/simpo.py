"""SimPO, preference optimisation without a reference (arXiv 2405.14734). Axes: S sequences, G groups of a pair each."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat
from torch.nn.functional import logsigmoid

from megalign.data.group import Pairing
from megalign.losses.base import LossConfig, LossOut, Scores, Traits, loss
from megalign.losses.group_means import chosen_less_rejected, implicit_reward_fit, reward_mean


class SimpoConfig(LossConfig):
    name: Literal["simpo"] = "simpo"
    beta: PositiveFloat = 2.0
    """Scale of the difference of mean log-probs by token."""
    gamma: NonNegativeFloat = 1.0
    """Margin by which the chosen response is to win, after scaling."""

    def traits(self) -> Traits:
        return Traits(Pairing("preference"), coupled=True)


@loss(SimpoConfig)
def simpo(scores: Scores, cfg: SimpoConfig) -> LossOut:
    """Return the contrast of the two responses' mean log-probs by token, less a margin; mean over groups.

    Metrics are of the implicit reward, beta times the mean log-prob by token: its mean over chosen and rejected, their
    margin, how often chosen is above, and its fit to known true rewards.
    """
    implicit_S = cfg.beta * scores.policy_S / scores.length_S
    chosen_S = scores.of_role("chosen")
    margin_G = chosen_less_rejected(implicit_S, chosen_S, scores.group_S, scores.num_groups)
    fixed_S, fixed_G = implicit_S.detach(), margin_G.detach()
    metrics = {
        "accuracy": (fixed_G > 0).double().mean(),
        "implicit_reward_chosen": fixed_S[chosen_S].mean(),
        "implicit_reward_rejected": fixed_S[~chosen_S].mean(),
        "implicit_reward_margin": fixed_G.mean(),
        **reward_mean(scores.reward_S),
        **implicit_reward_fit(fixed_S, scores.reward_S, scores.group_S, scores.num_groups),
    }
    return LossOut(-logsigmoid(margin_G - cfg.gamma).sum() / scores.num_groups, metrics)
