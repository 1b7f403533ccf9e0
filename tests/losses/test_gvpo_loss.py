"""GVPO: the hand case and the facts its paper states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megalign.losses.gvpo import GvpoConfig, gvpo
from megalign.losses.rloo import RlooConfig, rloo
from tests.support.slow_losses import SAMPLES, make_scores, ragged, rows


def gradient_of(loss, scores, cfg):
    leaf = scores.policy_S.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(replace(scores, policy_S=leaf), cfg).loss, leaf)[0]


def test_two_answers():
    # implicit 0.5 * [1, -1]; less reward [0, 1]: [0.5, -1.5]; centred [1, -1]; (1/2 + 1/2) / (2 - 1) = 1
    scores = make_scores(policy=[-1, -3], reference=[-2, -2], reward=[0, 1], group=[0, 0])
    out = gvpo(scores, GvpoConfig(beta=0.5))
    assert out.loss.item() == 1
    # s - s' is [1, -1]; the implicit reward falls by 1 where the true one rises by 1
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(
        {
            "reward_mean": 0.5,
            "kl": 0,
            "weight_sq": 1,
            "implicit_reward_slope": -1,
            "implicit_reward_correlation": -1,
        }
    )


def test_two_groups_of_unequal_size_weigh_alike():
    # first group: gap [0, 1], unbiased variance 1/2, halved 1/4; second: gap [0, 0, 3], variance 3, halved 3/2
    scores = make_scores(policy=[0] * 5, reference=[0] * 5, reward=[0, -1, 0, 0, -3], group=[0, 0, 1, 1, 1])
    assert gvpo(scores, GvpoConfig()).loss.item() == pytest.approx((1 / 4 + 3 / 2) / 2)


def test_loss_is_half_the_unbiased_variance():
    scores, cfg = ragged(SAMPLES), GvpoConfig(beta=0.7)
    gap_S = cfg.beta * (scores.policy_S - scores.reference_S) - scores.reward_S
    halves = [0.5 * gap_S[rows(scores, group)].var() for group in range(scores.num_groups)]
    assert gvpo(scores, cfg).loss.item() == pytest.approx(sum(halves).item() / len(halves), rel=1e-12)


def test_zero_exactly_at_the_tilted_reference():
    # log pi = log pi' + R / beta + a constant of the prompt
    scores, cfg = ragged(SAMPLES), GvpoConfig(beta=0.3)
    constant_S = torch.tensor([3.0, -1.0, 0.5, 7.0, -20.0], dtype=torch.float64)[scores.group_S]
    optimal_S = scores.reference_S + scores.reward_S / cfg.beta + constant_S
    out = gvpo(replace(scores, policy_S=optimal_S), cfg)
    assert out.loss.item() == pytest.approx(0, abs=1e-27)
    assert out.metrics["implicit_reward_slope"].item() == pytest.approx(1)
    assert out.metrics["implicit_reward_correlation"].item() == pytest.approx(1)
    nudged_S = optimal_S.index_fill(0, torch.tensor([4]), optimal_S[4].item() + 0.1)
    assert gvpo(replace(scores, policy_S=nudged_S), cfg).loss.item() > 1e-6


def test_gradient_is_the_published_one_and_sums_to_zero():
    scores, cfg = ragged(SAMPLES), GvpoConfig(beta=0.7)
    gradient_S = gradient_of(gvpo, scores, cfg)
    ratio_S = scores.policy_S - scores.reference_S
    for group in range(scores.num_groups):
        members = rows(scores, group)
        reward, ratio = scores.reward_S[members], ratio_S[members]
        weight = (reward - reward.mean()) - cfg.beta * (ratio - ratio.mean())
        expected = -cfg.beta / (len(members) - 1) * weight / scores.num_groups
        torch.testing.assert_close(gradient_S[members], expected)
        assert weight.sum().item() == pytest.approx(0, abs=1e-12)
        assert gradient_S[members].sum().item() == pytest.approx(0, abs=1e-12)


def test_at_the_reference_the_gradient_is_beta_times_that_of_rloo():
    scores, cfg = ragged(SAMPLES), GvpoConfig(beta=0.7)
    here = replace(scores, reference_S=scores.policy_S, old_S=scores.policy_S)
    expected_S = cfg.beta * gradient_of(rloo, here, RlooConfig(beta=0.0))
    torch.testing.assert_close(gradient_of(gvpo, here, cfg), expected_S, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("field", ["reward_S", "reference_S"])
def test_a_constant_of_the_prompt_changes_nothing(field):
    scores, cfg = ragged(SAMPLES), GvpoConfig(beta=0.7)
    constant_S = torch.tensor([3.0, -1.0, 0.5, 7.0, -2.0], dtype=torch.float64)[scores.group_S]
    shifted = replace(scores, **{field: getattr(scores, field) + constant_S})
    before, after = gvpo(scores, cfg), gvpo(shifted, cfg)
    assert after.loss.item() == pytest.approx(before.loss.item(), rel=1e-12)
    torch.testing.assert_close(gradient_of(gvpo, shifted, cfg), gradient_of(gvpo, scores, cfg), rtol=1e-10, atol=1e-14)
    for name in ("implicit_reward_slope", "implicit_reward_correlation", "weight_sq"):
        assert after.metrics[name].item() == pytest.approx(before.metrics[name].item(), rel=1e-10)


def test_holding_the_group_mean_constant_leaves_the_gradient():
    scores, cfg = ragged(SAMPLES), GvpoConfig(beta=0.7)
    leaf = scores.policy_S.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for group in range(scores.num_groups):
        members = rows(scores, group)
        gap = cfg.beta * (leaf - scores.reference_S)[members] - scores.reward_S[members]
        total = total + 0.5 * (gap - gap.mean().detach()).square().sum() / (len(members) - 1)
    (held_S,) = torch.autograd.grad(total / scores.num_groups, leaf)
    torch.testing.assert_close(gradient_of(gvpo, scores, cfg), held_S, rtol=1e-10, atol=1e-14)


def test_equal_rewards_still_pull_the_ratios_together():
    scores = make_scores(policy=[-1, -3, -2], reference=[-2, -2, -2], reward=[0.1] * 3, group=[0, 0, 0])
    out = gvpo(scores, GvpoConfig(beta=1.0))
    # implicit [1, -1, 0], already centred: (1/2 + 1/2) / 2
    assert out.loss.item() == pytest.approx(0.5)
    (gradient_S,) = torch.autograd.grad(out.loss, scores.policy_S)
    torch.testing.assert_close(gradient_S, torch.tensor([0.5, -0.5, 0.0], dtype=torch.float64), atol=1e-12, rtol=0)
    assert set(out.metrics) == {"reward_mean", "kl", "weight_sq"}  # nothing to correlate with


def test_at_the_reference_there_is_a_slope_but_no_correlation():
    scores = make_scores(policy=[-1, -3], reference=[-1, -3], reward=[0, 1], group=[0, 0])
    metrics = gvpo(scores, GvpoConfig()).metrics
    assert metrics["implicit_reward_slope"].item() == 0
    assert "implicit_reward_correlation" not in metrics


def test_kl_is_exact_in_expectation_over_the_policy():
    # two answers with policy 3/4, 1/4 and reference 1/2, 1/2; four samples in the policy's own proportions
    policy, reference = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    drawn = [0, 0, 0, 1]
    scores = make_scores(
        policy=[policy[i].item() for i in drawn],
        reference=[reference[i].item() for i in drawn],
        reward=[0.0, 0.0, 0.0, 1.0],
        group=[0] * 4,
    )
    divergence = (policy.exp() * (policy - reference)).sum().item()
    assert gvpo(scores, GvpoConfig()).metrics["kl"].item() == pytest.approx(divergence, rel=1e-6)
