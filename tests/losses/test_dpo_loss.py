"""DPO and IPO: hand cases."""

from __future__ import annotations

import math

import pytest
import torch

from megalign.losses.dpo import DpoConfig, dpo
from tests.support.slow_losses import make_scores


def test_known_preference():
    # s_c - s'_c = 10 log 3, s_r - s'_r = 0, beta 0.1: sigmoid(log 3) = 3/4
    scores = make_scores(
        policy=[-4, 10 * math.log(3) - 5], reference=[-4, -5], group=[0, 0], role=["rejected", "chosen"]
    )
    out = dpo(scores, DpoConfig())
    assert out.loss.item() == pytest.approx(-math.log(3 / 4))
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(
        {
            "accuracy": 1,
            "implicit_reward_chosen": math.log(3),
            "implicit_reward_rejected": 0,
            "implicit_reward_margin": math.log(3),
        }
    )
    # -beta (1 - sigmoid) for the chosen, its opposite for the rejected
    gradient_S = torch.autograd.grad(out.loss, scores.policy_S)[0]
    assert gradient_S.tolist() == pytest.approx([0.1 / 4, -0.1 / 4])


def test_ipo_compares_by_token():
    # chosen (-2 + 6) / 4 = 1, rejected (-9 + 3) / 3 = -2: 3 - 1 / (2 * 0.1) = -2, squared 4
    scores = make_scores(policy=[-2, -9], reference=[-6, -3], length=[4, 3], group=[0, 0], role=["chosen", "rejected"])
    out = dpo(scores, DpoConfig(variant="ipo"))
    assert out.loss.item() == pytest.approx(4)
    # implicit rewards are sums: 0.1 * (4 - -6)
    assert out.metrics["implicit_reward_margin"].item() == pytest.approx(1)
    # 2 * -2 / 4 and its opposite over 3
    assert torch.autograd.grad(out.loss, scores.policy_S)[0].tolist() == pytest.approx([-1, 4 / 3])


def test_a_tie_is_not_accurate():
    scores = make_scores(policy=[-2, -9], reference=[-2, -9], group=[0, 0], role=["chosen", "rejected"])
    assert dpo(scores, DpoConfig()).metrics["accuracy"].item() == 0
