"""ORPO: hand cases, odds near 0 and 1, and TRL's function on ragged pairs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megalign.losses.orpo import LARGEST_LOGP, OrpoConfig, log_odds, orpo
from tests.support.slow_losses import PAIRS, make_scores, ragged


def pair(chosen, rejected, length=(1, 1)):
    """One group of which the mean log-probs are log `chosen` and log `rejected`."""
    policy = [math.log(p) * size for p, size in zip((chosen, rejected), length)]
    return make_scores(policy=policy, length=length, group=[0, 0], role=["chosen", "rejected"])


def test_known_odds():
    # odds 3 and 1/3, ratio 9: -log sigmoid(log 9) = log(10/9)
    scores = pair(0.75, 0.25, length=(2, 5))
    out = orpo(scores, OrpoConfig(**{"lambda": 0.1}))
    assert out.loss.item() == pytest.approx(-math.log(0.75) + 0.1 * math.log(10 / 9))
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(
        {
            "accuracy": 1,
            "mean_logp_chosen": math.log(0.75),
            "mean_logp_rejected": math.log(0.25),
            "log_odds_ratio": math.log(9),
        }
    )
    # d log odds / d m = 1 / (1 - p): -1 - 0.1 * (1 - 0.9) * 4 for the chosen, 0.1 * 0.1 * 4 / 3 for the rejected
    gradient_S = torch.autograd.grad(out.loss, scores.policy_S)[0]
    assert gradient_S.tolist() == pytest.approx([-1.04 / 2, 0.04 / 3 / 5])


def test_without_the_odds_it_is_the_mean_likelihood_of_the_chosen():
    out = orpo(pair(0.75, 0.25), OrpoConfig(**{"lambda": 0.0}))
    assert out.loss.item() == pytest.approx(-math.log(0.75))


@pytest.mark.parametrize("logp", [-1e-6, -1e-3, -0.5, -math.log(2), -1.0, -20.0, -700.0])
def test_log_odds_where_one_less_p_cancels(logp):
    value = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    result = log_odds(value)
    # 1 - e^m = -m - m^2/2 - m^3/6 near 0
    one_less = -logp - logp**2 / 2 - logp**3 / 6 if logp > -0.01 else 1 - math.exp(logp)
    assert result.item() == pytest.approx(logp - math.log(one_less), rel=1e-9)
    assert torch.autograd.grad(result, value)[0].item() == pytest.approx(1 / one_less, rel=1e-9)


@pytest.mark.parametrize("logp", [0.0, 1e-6, LARGEST_LOGP / 2])
def test_certainty_is_finite(logp):
    scores = make_scores(policy=[logp, logp], group=[0, 0], role=["chosen", "rejected"])
    out = orpo(scores, OrpoConfig())
    gradient_S = torch.autograd.grad(out.loss, scores.policy_S)[0]
    assert out.loss.isfinite() and gradient_S.isfinite().all()


def test_no_reference_is_asked_for():
    assert not OrpoConfig().traits().reference


def test_the_key_is_lambda():
    assert OrpoConfig(**{"lambda": 0.3}).model_dump(by_alias=True) == {"name": "orpo", "lambda": 0.3}


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_equals_trl(weight):
    trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    settings = SimpleNamespace(beta=weight, accelerator=SimpleNamespace(device="cpu"))
    scores = ragged(PAIRS)
    mean_S, chosen_S = scores.policy_S / scores.length_S, scores.of_role("chosen")
    order = scores.group_S.argsort()
    chosen_G, rejected_G = mean_S[order][chosen_S[order]], mean_S[order][~chosen_S[order]]
    ratio_G, *_, log_odds_ratio = trainer.odds_ratio_loss(settings, chosen_G, rejected_G)
    # TRL's other term is the token mean over prompt and response; the paper's, and ours, is over the response.
    out = orpo(scores, OrpoConfig(**{"lambda": weight}))
    assert out.loss.item() == pytest.approx((-chosen_G.mean() - ratio_G.mean()).item(), rel=1e-6)  # TRL's is fp32
    assert out.metrics["log_odds_ratio"].item() == pytest.approx(log_odds_ratio.item(), rel=1e-6)
