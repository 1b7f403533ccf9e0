"""SimPO: a hand case, and TRL's function on ragged pairs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megalign.losses.simpo import SimpoConfig, simpo
from tests.support.slow_losses import PAIRS, make_scores, ragged


def test_known_preference():
    # means -1 and -3: 2 * 2 - 1 = 3; sigmoid(3)
    scores = make_scores(policy=[-4, -9], length=[4, 3], group=[0, 0], role=["chosen", "rejected"])
    out = simpo(scores, SimpoConfig(beta=2.0, gamma=1.0))
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(-3)))
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(
        {"accuracy": 1, "implicit_reward_chosen": -2, "implicit_reward_rejected": -6, "implicit_reward_margin": 4}
    )
    # -beta (1 - sigmoid(3)) / |y|, and its opposite
    push = 2 / (1 + math.exp(3))
    gradient_S = torch.autograd.grad(out.loss, scores.policy_S)[0]
    assert gradient_S.tolist() == pytest.approx([-push / 4, push / 3])


def test_no_reference_is_asked_for():
    assert not SimpoConfig().traits().reference


@pytest.mark.parametrize("beta, gamma", [(2.0, 1.0), (10.0, 3.0), (0.5, 0.0)])
def test_equals_trl(beta, gamma):
    trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    settings = SimpleNamespace(
        alpha=0.0, beta=beta, simpo_gamma=gamma, label_smoothing=0.0, loss_type="simpo",
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    scores = ragged(PAIRS)
    mean_S, chosen_S = scores.policy_S / scores.length_S, scores.of_role("chosen")
    order = scores.group_S.argsort()
    chosen_G, rejected_G = mean_S[order][chosen_S[order]], mean_S[order][~chosen_S[order]]
    loss_G, chosen_reward_G, rejected_reward_G = trainer.cpo_loss(settings, chosen_G, rejected_G)
    out = simpo(scores, SimpoConfig(beta=beta, gamma=gamma))
    assert out.loss.item() == pytest.approx(loss_G.mean().item(), rel=1e-12)
    assert out.metrics["implicit_reward_chosen"].item() == pytest.approx(chosen_reward_G.mean().item())
    assert out.metrics["implicit_reward_rejected"].item() == pytest.approx(rejected_reward_G.mean().item())
