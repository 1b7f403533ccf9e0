"""EPA: hand cases, its gradient in the implicit rewards, DPO as the case of one negative, and its metrics."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megalign.losses.dpo import DpoConfig, dpo
from megalign.losses.epa import EpaConfig, epa
from tests.support.slow_losses import CONTRASTS, PAIRS, make_scores, ragged, rows

ROLES = ["positive", "strong", "weak", "weak"]


def test_equal_scores_share_alike():
    scores = make_scores(policy=[-1, -2, -3, -4], reference=[-1, -2, -3, -4], group=[0] * 4, role=ROLES)
    out = epa(scores, EpaConfig())
    assert out.loss.item() == pytest.approx(math.log(4))
    assert out.metrics["p_positive"].item() == pytest.approx(1 / 4)


def test_known_shares():
    # beta (s - s') = log [6, 3, 2, 1]: the positive has 6 of 12; it is above everything
    ratio = [math.log(6) / 0.1, math.log(3) / 0.1, math.log(2) / 0.1, 0.0]
    scores = make_scores(policy=ratio, reference=[0] * 4, group=[0] * 4, role=ROLES, reward=[3.0, 1.0, 9.0, math.nan])
    out = epa(scores, EpaConfig())
    assert out.loss.item() == pytest.approx(math.log(2))
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(
        {
            "p_positive": 1 / 2,
            "reward_mean": 2,  # of 3 and 1
            "accuracy_strong": 1,
            "accuracy_weak": 1,
            "implicit_reward_positive": math.log(6),
            "implicit_reward_strong": math.log(3),
            "implicit_reward_weak": math.log(2) / 2,
            "implicit_reward_slope": math.log(2)
            / 2,  # log 6 - log 3 over 3 - 1; the weak one's 9 is not for this prompt
            "implicit_reward_correlation": 1,
        }
    )
    (gradient_S,) = torch.autograd.grad(out.loss, scores.policy_S)
    expected = [0.1 * p for p in (-(1 - 1 / 2), 3 / 12, 2 / 12, 1 / 12)]
    assert gradient_S.tolist() == pytest.approx(expected)


def test_gradient_is_minus_one_minus_p_for_the_positive_and_p_for_each_negative():
    scores, cfg = ragged(CONTRASTS), EpaConfig(beta=0.8)
    leaf = scores.policy_S.clone().requires_grad_()
    (gradient_S,) = torch.autograd.grad(epa(replace(scores, policy_S=leaf), cfg).loss, leaf)
    for group in range(scores.num_groups):
        members = rows(scores, group)
        share = (cfg.beta * (scores.policy_S - scores.reference_S)[members]).softmax(0)
        target = torch.tensor([float(scores.role_S[i] == "positive") for i in members])
        torch.testing.assert_close(gradient_S[members], cfg.beta * (share - target) / scores.num_groups)


def test_one_negative_is_dpo():
    pairs = ragged(PAIRS)
    names = {"chosen": "positive", "rejected": "strong"}
    contrast = replace(pairs, role_S=tuple(names[role] for role in pairs.role_S))
    ours, theirs = epa(contrast, EpaConfig(beta=0.4)), dpo(pairs, DpoConfig(beta=0.4))
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-12)
    assert ours.metrics["accuracy_strong"].item() == theirs.metrics["accuracy"].item()
    assert ours.metrics["implicit_reward_slope"].item() == theirs.metrics["implicit_reward_slope"].item()


def test_metrics_of_absent_negatives_and_unknown_rewards_are_left_out():
    scores = make_scores(policy=[-1, -2], reference=[0, 0], group=[0, 0], role=["positive", "weak"])
    nan = [math.nan] * 2
    unknown = make_scores(policy=[-1, -2], reference=[0, 0], group=[0, 0], role=["positive", "strong"], reward=nan)
    assert set(epa(scores, EpaConfig()).metrics) == {
        "p_positive",
        "accuracy_weak",
        "implicit_reward_positive",
        "implicit_reward_weak",
    }
    assert set(epa(unknown, EpaConfig()).metrics) == {
        "p_positive",
        "accuracy_strong",
        "implicit_reward_positive",
        "implicit_reward_strong",
    }


def test_accuracies_count_pairs():
    # implicit rewards 2 | 1, 3 strong | 0, 2 weak: one of two strong and one of two weak are below (a tie is not)
    scores = make_scores(
        policy=[2, 1, 3, 0, 2],
        reference=[0] * 5,
        group=[0] * 5,
        role=["positive", "strong", "strong", "weak", "weak"],
    )
    metrics = epa(scores, EpaConfig(beta=1.0)).metrics
    assert metrics["accuracy_strong"].item() == 0.5
    assert metrics["accuracy_weak"].item() == 0.5


def test_slope_is_one_where_the_implicit_reward_is_the_true_one_up_to_the_prompt():
    scores, cfg = ragged(CONTRASTS), EpaConfig(beta=0.5)
    constant_S = torch.tensor([9.0, -4.0, 2.0, 0.0], dtype=torch.float64)[scores.group_S]
    known_S = scores.reward_S.nan_to_num(nan=123.0)
    true = replace(scores, policy_S=scores.reference_S + (known_S + constant_S) / cfg.beta)
    metrics = epa(true, cfg).metrics
    assert metrics["implicit_reward_slope"].item() == pytest.approx(1)
    assert metrics["implicit_reward_correlation"].item() == pytest.approx(1)


def test_settings_reach_the_loader():
    traits = EpaConfig(strong=3, weak=0, strong_from="random", weak_from="positives").traits()
    pairing = traits.pairing
    assert (pairing.kind, pairing.strong, pairing.weak) == ("contrast", 3, 0)
    assert (pairing.strong_from, pairing.weak_from) == ("random", "positives")
