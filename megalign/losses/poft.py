"""PoFT, preference-oriented supervised fine-tuning (arXiv 2412.12865). Axes: S sequences, one a group."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat
from torch.nn.functional import logsigmoid

from megalign.data.group import Pairing
from megalign.losses.base import LossConfig, LossOut, Scores, Traits, loss


class PoftConfig(LossConfig):
    name: Literal["poft"] = "poft"
    beta: PositiveFloat = 1.0
    """Scale of the policy's mean log-prob less the teachers' inside the sigmoid; the paper's is 1."""
    gamma: float = 0.0
    """Margin by which the policy is to exceed the teachers, in nats a token after scaling."""

    def traits(self) -> Traits:
        return Traits(Pairing("single"), teachers=True, accuracy=True)


@loss(PoftConfig)
def poft(scores: Scores, cfg: PoftConfig) -> LossOut:
    """Return -log sigmoid of the policy's gap to the aligned models on the same response, mean over groups.

    Metrics: tau_mean, the mean weight on a sample's token-mean cross-entropy gradient; teacher_margin, the mean of
    policy less teachers in log-prob by token.
    """
    assert scores.teacher_S is not None
    gap_S = scores.policy_S / scores.length_S - scores.teacher_S
    preference_S = cfg.beta * gap_S - cfg.gamma
    tau_S = cfg.beta * (-preference_S.detach()).sigmoid()
    metrics = {"tau_mean": tau_S.mean(), "teacher_margin": gap_S.detach().mean()}
    return LossOut(-logsigmoid(preference_S).sum() / scores.num_groups, metrics)
