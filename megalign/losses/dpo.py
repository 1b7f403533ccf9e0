"""DPO and its IPO variant. Axes: S sequences, one chosen and one rejected a group; G groups with sequences here."""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import PositiveFloat
from torch.nn.functional import logsigmoid

from megalign.data.group import Pairing
from megalign.losses.base import LossConfig, LossOut, Scores, Traits, loss
from megalign.losses.group_means import chosen_less_rejected, implicit_reward_fit, reward_mean


class DpoConfig(LossConfig):
    name: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    """Scale of the implicit reward (beta x log-ratio to the reference); larger keeps the policy nearer to the
    reference."""
    variant: Literal["sigmoid", "ipo"] = "sigmoid"
    """Form of the contrast: sigmoid is DPO, ipo the squared one of IPO, which does not run off when pairs are
    certain."""

    def traits(self) -> Traits:
        return Traits(Pairing("preference"), coupled=True, reference=True)


@loss(DpoConfig)
def dpo(scores: Scores, cfg: DpoConfig) -> LossOut:
    """Return the contrast of the chosen with the rejected response, mean over groups.

    Metrics are of the implicit reward, beta times the log-ratio to the reference (summed over tokens, for IPO too):
    its mean over chosen and rejected, their margin, how often chosen is above, and its fit to known true rewards.
    """
    assert scores.reference_S is not None
    ipo = cfg.variant == "ipo"
    ratio_S = scores.policy_S - scores.reference_S
    chosen_S, rejected_S = scores.of_role("chosen"), scores.of_role("rejected")
    contrast = partial(chosen_less_rejected, chosen_S=chosen_S, group_S=scores.group_S, num_groups=scores.num_groups)
    gap_G = contrast(ratio_S / scores.length_S if ipo else ratio_S)
    loss_G = (gap_G - 1 / (2 * cfg.beta)).square() if ipo else -logsigmoid(cfg.beta * gap_G)
    implicit_S = cfg.beta * ratio_S.detach()
    margin_G = contrast(implicit_S)
    metrics = {
        "accuracy": (margin_G > 0).double().mean(),
        "implicit_reward_chosen": implicit_S[chosen_S].mean(),
        "implicit_reward_rejected": implicit_S[rejected_S].mean(),
        "implicit_reward_margin": margin_G.mean(),
        **reward_mean(scores.reward_S),
        **implicit_reward_fit(implicit_S, scores.reward_S, scores.group_S, scores.num_groups),
    }
    return LossOut(loss_G.sum() / scores.num_groups, metrics)
