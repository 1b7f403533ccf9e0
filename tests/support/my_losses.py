"""Losses of a user's own, named `tests.support.my_losses:...` in configurations; the layouts are compared on them."""

from __future__ import annotations

import torch

from megalign.losses import LossConfig, LossOut, Pairing, Scores, Traits, loss


class MarginConfig(LossConfig):
    margin: float = 1.0

    def traits(self) -> Traits:
        return Traits(Pairing("preference"), coupled=True)


@loss(MarginConfig)
def margin(scores: Scores, cfg: MarginConfig) -> LossOut:
    """Squared hinge on how far the chosen response's mean log-prob is above the rejected one's."""
    signed_S = (scores.policy_S / scores.length_S).where(scores.of_role("chosen"), -scores.policy_S / scores.length_S)
    gap_G = signed_S.new_zeros(scores.num_groups).index_add(0, scores.group_S, signed_S)
    here_G = torch.bincount(scores.group_S, minlength=scores.num_groups) > 0
    lost_G = (cfg.margin - gap_G).relu().where(here_G, 0)
    return LossOut(lost_G.square().sum() / scores.num_groups, {"violations": (lost_G[here_G] > 0).double().mean()})


class FocalConfig(LossConfig):
    gamma: float = 1.0
    pull: float = 0.5

    def traits(self) -> Traits:
        return Traits(Pairing("single"), level="token", reference=True, token_metrics=("hardness",))


@loss(FocalConfig)
def focal(scores: Scores, cfg: FocalConfig) -> LossOut:
    """Cross-entropy with weight (1 - p)^gamma by token, and a squared distance to the reference."""
    assert scores.policy_T is not None and scores.reference_T is not None
    policy_T = scores.policy_T.double()
    hard_T = (1 - policy_T.exp()) ** cfg.gamma
    away_T = policy_T - scores.reference_T.double()
    loss_T = -hard_T * policy_T + cfg.pull * away_T.square()
    return LossOut(loss_T.sum() / scores.num_tokens, {"hardness": hard_T.detach().sum() / scores.num_tokens})
