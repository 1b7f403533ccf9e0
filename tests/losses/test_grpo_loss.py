"""GRPO, Dr.GRPO, DAPO: hand cases on two answers of one and three tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megalign.losses.base import choose_loss
from megalign.losses.grpo import GrpoConfig, grpo, grpo_advantages
from megalign.schema import UserError
from tests.support.slow_losses import make_scores


def two_answers(policy: list[float], *, reward: tuple[float, float] = (1.0, 0.0), reference: float = 0.0):
    """Answer 0 has token 0, answer 1 the other three; old log-probs are zero."""
    scores = make_scores(policy=[0, 0], length=[1, 3], reward=list(reward), group=[0, 0])
    return replace(
        scores,
        policy_T=torch.tensor(policy, dtype=torch.float64, requires_grad=True),
        old_T=torch.zeros(4),
        reference_T=torch.full((4,), reference, dtype=torch.float64),
        seq_T=torch.tensor([0, 1, 1, 1]),
    )


# rewards 1 and 0: mean 1/2, unbiased deviation sqrt(1/2)
ADVANTAGE = 0.5 / (math.sqrt(0.5) + 1e-4)


def test_advantages():
    scores = two_answers([0.0] * 4)
    assert grpo_advantages(scores, GrpoConfig()).tolist() == pytest.approx([ADVANTAGE, -ADVANTAGE])
    centred = GrpoConfig(variant="dr_grpo", max_response_length=4)
    assert grpo_advantages(scores, centred).tolist() == [0.5, -0.5]


def test_on_policy_the_loss_is_zero_and_the_gradient_is_not():
    scores = two_answers([0.0] * 4)
    out = grpo(scores, GrpoConfig())
    assert out.loss.item() == pytest.approx(0, abs=1e-15)
    gradient_T = torch.autograd.grad(out.loss, scores.policy_T)[0]
    expected = [-ADVANTAGE / 2, *[ADVANTAGE / 6] * 3]  # mean over two answers of means over their tokens
    assert gradient_T.tolist() == pytest.approx(expected)


def test_variants_divide_by_what_they_say():
    scores = two_answers([0.0] * 4)
    # tokens add up to -A + 3 A
    centred = GrpoConfig(variant="dr_grpo", max_response_length=10)
    assert grpo(scores, centred).loss.item() == pytest.approx((3 - 1) * 0.5 / (2 * 10))
    assert grpo(scores, GrpoConfig(variant="dapo")).loss.item() == pytest.approx((3 - 1) * ADVANTAGE / 4)


def test_clip_by_token():
    # A > 0 with ratio 1.5 is held at 1.2; A < 0 with 0.5 at 0.8; A < 0 with 1.5 is not held
    scores = two_answers([math.log(1.5), math.log(0.5), math.log(1.5), 0.0])
    out = grpo(scores, GrpoConfig())
    assert out.loss.item() == pytest.approx(ADVANTAGE * (-1.2 + (0.8 + 1.5 + 1.0) / 3) / 2)
    assert out.metrics["clip_fraction"].item() == 0.5
    gradient_T = torch.autograd.grad(out.loss, scores.policy_T)[0]
    assert gradient_T.tolist() == pytest.approx([0, 0, 1.5 * ADVANTAGE / 6, ADVANTAGE / 6])
    # dapo lets ratios rise to 1.28
    out = grpo(scores, GrpoConfig(variant="dapo"))
    assert out.loss.item() == pytest.approx(ADVANTAGE * (-1.28 + 0.8 + 1.5 + 1.0) / 4)


def test_divergence_from_the_reference():
    # reference - policy = log 2 everywhere: k3 = 2 - log 2 - 1; equal rewards leave nothing else
    scores = two_answers([0.0] * 4, reward=(1.0, 1.0), reference=math.log(2))
    out = grpo(scores, GrpoConfig(beta=0.5))
    k3 = 1 - math.log(2)
    assert out.loss.item() == pytest.approx(0.5 * k3)
    assert out.metrics["kl"].item() == pytest.approx(k3)
    # d k3 / d policy = 1 - 2
    gradient_T = torch.autograd.grad(out.loss, scores.policy_T)[0]
    assert gradient_T.tolist() == pytest.approx([-0.5 / 2, *[-0.5 / 6] * 3])


def test_reward_mean_is_over_responses():
    assert grpo(two_answers([0.0] * 4), GrpoConfig()).metrics["reward_mean"].item() == pytest.approx(0.5)


def test_a_reference_is_asked_for_only_where_it_is_used():
    assert not GrpoConfig().traits().reference
    assert GrpoConfig(beta=0.1).traits().reference
    scores = replace(two_answers([0.0] * 4), reference_T=None)
    assert "kl" not in grpo(scores, GrpoConfig()).metrics


def test_upper_clip_depends_on_the_variant_unless_given():
    assert GrpoConfig().clip_high == 0.2
    assert GrpoConfig(variant="dapo").clip_high == 0.28
    assert GrpoConfig(variant="dapo", clip_high=0.2).clip_high == 0.2
    resolved = GrpoConfig(variant="dapo").model_dump()
    assert choose_loss(resolved) == GrpoConfig(variant="dapo")


@pytest.mark.parametrize(
    "raw", [{"variant": "dr_grpo"}, {"max_response_length": 8}, {"variant": "dapo", "max_response_length": 8}]
)
def test_max_response_length_belongs_to_dr_grpo(raw):
    with pytest.raises(UserError, match=r"^loss\.max_response_length is .*dr_grpo"):
        choose_loss({"name": "grpo", **raw})
