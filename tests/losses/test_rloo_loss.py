"""RLOO: hand cases, the penalty, the clip."""

from __future__ import annotations

import math

import pytest
import torch

from megalign.losses.rloo import RlooConfig, rloo, rloo_advantages
from tests.support.slow_losses import make_scores


def test_on_policy_the_loss_is_zero_and_the_gradient_is_not():
    # rewards 0, 1, 5: against the others' means 3, 2.5, 0.5; gradient -A / k
    scores = make_scores(policy=[-1, -2, -3], old=[-1, -2, -3], reward=[0, 1, 5], group=[0] * 3)
    out = rloo(scores, RlooConfig(beta=0.0))
    assert out.loss.item() == pytest.approx(0, abs=1e-15)
    gradient_S = torch.autograd.grad(out.loss, scores.policy_S)[0]
    assert gradient_S.tolist() == pytest.approx([3 / 3, 1.5 / 3, -4.5 / 3])
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(
        {"reward_mean": 2, "advantage_sq": (9 + 2.25 + 20.25) / 3, "clip_fraction": 0}
    )


def test_distance_of_old_from_the_reference_is_taken_off_the_reward():
    # old - reference = 2 and -4: rewards 1 - 0.1 and 0 + 0.2, so advantages 0.7 and -0.7; kl is the mean, -1
    scores = make_scores(policy=[-1, -5], old=[-1, -5], reference=[-3, -1], reward=[1, 0], group=[0, 0])
    cfg = RlooConfig()
    assert rloo_advantages(scores, cfg).tolist() == pytest.approx([0.7, -0.7])
    assert rloo(scores, cfg).metrics["kl"].item() == pytest.approx(-1)


@pytest.mark.parametrize(
    "ratio, value, slope",
    [
        # (advantage 1, advantage -1): the clip only ever takes away what would be gained
        ([1.5, 1.0], (-1.2 + 1.0) / 2, [0.0, 0.5]),
        ([0.5, 1.0], (-0.5 + 1.0) / 2, [-0.25, 0.5]),
        ([1.0, 0.5], (-1.0 + 0.8) / 2, [-0.5, 0.0]),
        ([1.0, 1.5], (-1.0 + 1.5) / 2, [-0.5, 0.75]),
    ],
)
def test_clip(ratio, value, slope):
    scores = make_scores(policy=[math.log(r) for r in ratio], old=[0, 0], reward=[1, 0], group=[0, 0])
    out = rloo(scores, RlooConfig(beta=0.0))
    assert out.loss.item() == pytest.approx(value)
    assert torch.autograd.grad(out.loss, scores.policy_S)[0].tolist() == pytest.approx(slope)
    assert out.metrics["clip_fraction"].item() == (0.5 if 0.0 in slope else 0)


def test_a_reference_is_asked_for_only_where_it_is_used():
    assert RlooConfig().traits().reference
    assert not RlooConfig(beta=0.0).traits().reference
    assert RlooConfig(beta=0.0).traits().old
