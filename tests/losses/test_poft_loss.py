"""PoFT: the hand case, and its gradient as a weighted cross-entropy gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megalign.losses.poft import PoftConfig, poft
from tests.support.slow_losses import SINGLES, make_scores, ragged


def test_equal_to_the_teachers_is_log_two():
    # mean log-prob by token -6 / 3 = -2, as the teachers'
    scores = make_scores(policy=[-6], length=[3], teacher=[-2.0], group=[0])
    out = poft(scores, PoftConfig())
    assert out.loss.item() == pytest.approx(math.log(2))
    assert out.metrics["tau_mean"].item() == 0.5
    assert out.metrics["teacher_margin"].item() == 0


def test_known_preference():
    # -6 / 3 - (-2 - log 3) = log 3: sigmoid is 3/4
    scores = make_scores(policy=[-6], length=[3], teacher=[-2 - math.log(3)], group=[0])
    out = poft(scores, PoftConfig())
    assert out.loss.item() == pytest.approx(-math.log(3 / 4))
    assert out.metrics["tau_mean"].item() == pytest.approx(1 / 4)
    # beta 2 and margin log 3: 2 log 3 - log 3 inside
    scaled = poft(scores, PoftConfig(beta=2.0, gamma=math.log(3)))
    assert scaled.loss.item() == pytest.approx(-math.log(3 / 4))
    assert scaled.metrics["tau_mean"].item() == pytest.approx(2 / 4)
    # the weight on the gradient of minus the mean log-prob by token, -1 / 3
    assert torch.autograd.grad(scaled.loss, scores.policy_S)[0].item() == pytest.approx(-2 / 4 / 3)


def test_gradient_is_tau_times_that_of_the_token_mean_cross_entropy():
    scores = ragged(SINGLES)
    leaf = scores.policy_S.clone().requires_grad_()
    (gradient_S,) = torch.autograd.grad(poft(replace(scores, policy_S=leaf), PoftConfig()).loss, leaf)
    tau_S = 1 / (1 + (scores.policy_S / scores.length_S - scores.teacher_S).exp())
    cross_entropy = (-(leaf / scores.length_S)).mean()
    (plain_S,) = torch.autograd.grad(cross_entropy, leaf)
    torch.testing.assert_close(gradient_S, tau_S * plain_S, rtol=1e-12, atol=0)


def test_a_hopeless_sample_still_teaches():
    # sigmoid underflows long before -1e4; the loss is then the gap itself and tau is 1
    scores = make_scores(policy=[-1e4], length=[1], teacher=[-1.0], group=[0])
    out = poft(scores, PoftConfig())
    assert out.loss.item() == 9999
    assert torch.autograd.grad(out.loss, scores.policy_S)[0].item() == -1
