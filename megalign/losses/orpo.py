"""ORPO, odds ratio preference optimisation (arXiv 2403.07691). Axes: S sequences, G groups of a pair each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from megalign.data.group import Pairing
from megalign.losses.base import LossConfig, LossOut, Scores, Traits, loss
from megalign.losses.group_means import chosen_less_rejected, reward_mean

# A mean log-prob above this is a probability that fp32 cannot tell from 1; log-odds are capped there.
LARGEST_LOGP = -1e-7


class OrpoConfig(LossConfig):
    name: Literal["orpo"] = "orpo"
    # Python takes the word `lambda` for itself.
    weight: Annotated[NonNegativeFloat, Field(alias="lambda")] = 0.1
    """Weight of the odds ratio beside the chosen response's likelihood."""

    def traits(self) -> Traits:
        return Traits(Pairing("preference"), coupled=True)


def log_odds(logp_S: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of log-probs log p in float64; finite, with a finite gradient, up to p = 1."""
    logp_S = logp_S.clamp(max=LARGEST_LOGP)
    return logp_S - (-logp_S.expm1()).log()


@loss(OrpoConfig)
def orpo(scores: Scores, cfg: OrpoConfig) -> LossOut:
    """Return the chosen response's mean negative log-prob plus lambda times the odds ratio's loss, mean over groups.

    Metrics: accuracy, how often the chosen response's mean log-prob by token is above the rejected one's; both means;
    log_odds_ratio, the mean of log(odds chosen / odds rejected).
    """
    mean_S = scores.policy_S / scores.length_S
    chosen_S = scores.of_role("chosen")
    ratio_G = chosen_less_rejected(log_odds(mean_S), chosen_S, scores.group_S, scores.num_groups)
    loss_G = -mean_S[chosen_S] - cfg.weight * logsigmoid(ratio_G)
    fixed_S = mean_S.detach()
    metrics = {
        "accuracy": (chosen_less_rejected(fixed_S, chosen_S, scores.group_S, scores.num_groups) > 0).double().mean(),
        "mean_logp_chosen": fixed_S[chosen_S].mean(),
        "mean_logp_rejected": fixed_S[~chosen_S].mean(),
        "log_odds_ratio": ratio_G.detach().mean(),
        **reward_mean(scores.reward_S),
    }
    return LossOut(loss_G.sum() / scores.num_groups, metrics)
