"""What holds for every loss: it equals its slow version, and shares of a batch add up to the batch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megalign.losses import LOSSES, choose_loss, prepared
from megalign.losses.base import token_metrics_problem
from tests.support import slow_losses
from tests.support.slow_losses import CONTRASTS, PAIRS, SAMPLES, SINGLES, part, ragged

CASES = [
    ({"name": "sft"}, SINGLES),
    ({"name": "sft"}, SAMPLES),
    ({"name": "poft"}, SINGLES),
    ({"name": "poft", "beta": 2.5, "gamma": 0.3}, SINGLES),
    ({"name": "dpo"}, PAIRS),
    ({"name": "dpo", "beta": 1.5}, PAIRS),
    ({"name": "dpo", "variant": "ipo"}, PAIRS),
    ({"name": "dpo", "variant": "ipo", "beta": 2.0}, PAIRS),
    ({"name": "simpo"}, PAIRS),
    ({"name": "simpo", "beta": 0.7, "gamma": 0.2}, PAIRS),
    ({"name": "orpo"}, PAIRS),
    ({"name": "orpo", "lambda": 2.0}, PAIRS),
    ({"name": "epa"}, CONTRASTS),
    ({"name": "epa", "beta": 1.5}, CONTRASTS),
    ({"name": "grpo"}, SAMPLES),
    ({"name": "grpo", "beta": 0.3, "clip_low": 0.1, "clip_high": 0.25}, SAMPLES),
    ({"name": "grpo", "variant": "dr_grpo", "max_response_length": 9, "beta": 0.3}, SAMPLES),
    ({"name": "grpo", "variant": "dapo", "beta": 0.3}, SAMPLES),
    ({"name": "rloo"}, SAMPLES),
    ({"name": "rloo", "beta": 0.0, "clip": 0.4}, SAMPLES),
    ({"name": "gvpo"}, SAMPLES),
    ({"name": "gvpo", "beta": 1.0}, SAMPLES),
]
TOKEN_CASES = [case for case in CASES if choose_loss(case[0]).traits().level == "token"]


def over(cases):
    names = [f"{' '.join(map(str, raw.values()))} x{max(map(len, roles))}" for raw, roles in cases]
    return pytest.mark.parametrize("raw, roles", cases, ids=names)


every_loss, every_token_loss = over(CASES), over(TOKEN_CASES)


def policy_of(scores, cfg):
    return scores.policy_T if cfg.traits().level == "token" else scores.policy_S


def evaluate(scores, cfg):
    """(LossOut, gradient to the policy's log-probs)."""
    leaf = policy_of(scores, cfg).detach().clone().requires_grad_()
    field = "policy_T" if cfg.traits().level == "token" else "policy_S"
    out = LOSSES[cfg.name].function(replace(scores, **{field: leaf}), cfg)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    return out, gradient


@every_loss
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_equal_the_slow_loops(raw, roles, seed):
    cfg, scores = choose_loss(raw), ragged(roles, seed=seed)
    slow = getattr(slow_losses, cfg.name)
    out, gradient = evaluate(scores, cfg)
    point = policy_of(scores, cfg).tolist()
    assert out.loss.item() == pytest.approx(slow(scores, cfg, point), rel=1e-12)
    step = 1e-5
    for i, analytic in enumerate(gradient.tolist()):
        up = slow(scores, cfg, [*point[:i], point[i] + step, *point[i + 1 :]])
        down = slow(scores, cfg, [*point[:i], point[i] - step, *point[i + 1 :]])
        assert analytic == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-8)


def shares(scores, coupled, level):
    """The batch cut into three: by group where coupled, else anywhere; for token losses also inside sequences."""
    key_S = scores.group_S if coupled else torch.arange(len(scores.group_S))
    if level == "token":
        cut_T = torch.arange(len(scores.seq_T)) % 3
        all_S = torch.ones(len(key_S), dtype=torch.bool)
        return [part(scores, all_S, cut_T == third) for third in range(3)]
    return [part(scores, key_S % 3 == third) for third in range(3)]


@every_loss
def test_shares_add_up(raw, roles):
    cfg = choose_loss(raw)
    scores = prepared(ragged(roles), cfg)
    traits = cfg.traits()
    whole, gradient = evaluate(scores, cfg)
    parts = [evaluate(share, cfg) for share in shares(scores, traits.coupled, traits.level)]
    assert sum(out.loss for out, _ in parts).item() == pytest.approx(whole.loss.item(), rel=1e-12)
    number = replace(
        scores,
        policy_S=torch.arange(scores.num_sequences, dtype=torch.float64),
        policy_T=torch.arange(scores.num_tokens, dtype=torch.float64),
    )
    for share, (_, partial) in zip(shares(number, traits.coupled, traits.level), parts):
        torch.testing.assert_close(partial, gradient[policy_of(share, cfg).long()], rtol=1e-12, atol=0)
    if traits.level == "token":
        for name, value in whole.metrics.items():
            assert sum(out.metrics[name] for out, _ in parts).item() == pytest.approx(value.item(), rel=1e-12)


@every_token_loss
def test_whole_sequences_are_shares_of_token_losses_too(raw, roles):
    cfg = choose_loss(raw)
    scores = prepared(ragged(roles), cfg)
    parts = [part(scores, torch.arange(scores.num_sequences) % 3 == third) for third in range(3)]
    whole = evaluate(scores, cfg)[0].loss.item()
    assert sum(evaluate(share, cfg)[0].loss for share in parts).item() == pytest.approx(whole, rel=1e-12)


@every_token_loss
def test_token_losses_declare_their_metrics(raw, roles):
    cfg = choose_loss(raw)
    traits, out = cfg.traits(), evaluate(prepared(ragged(roles), cfg), cfg)[0]
    assert token_metrics_problem(out, traits) is None
    more = replace(out, metrics={**out.metrics, "more": out.loss})
    line = ", ".join(sorted([*traits.token_metrics, "more"]))
    assert token_metrics_problem(more, traits) == (
        f"returned the metrics {line}; must be those of its traits' token_metrics, "
        f"{', '.join(sorted(traits.token_metrics)) or 'none'}"
    )


@every_loss
def test_advantages_do_not_look_at_the_policy(raw, roles):
    cfg, scores = choose_loss(raw), ragged(roles)
    blind = prepared(replace(scores, policy_S=torch.zeros_like(scores.policy_S), policy_T=None), cfg)
    seeing = replace(scores, group_size_S=blind.group_size_S, advantage_S=blind.advantage_S)
    assert evaluate(seeing, cfg)[0].loss.item() == evaluate(scores, cfg)[0].loss.item()


@every_loss
def test_metrics_are_finite_and_carry_no_gradient(raw, roles):
    cfg, scores = choose_loss(raw), ragged(roles)
    out, _ = evaluate(scores, cfg)
    for name, value in out.metrics.items():
        assert not value.requires_grad and value.ndim == 0, name
        assert math.isfinite(value.item()), name


@every_loss
@pytest.mark.parametrize("scale", [1e3, -1e3, 1e5])
def test_extreme_scores_stay_finite(raw, roles, scale):
    cfg, scores = choose_loss(raw), ragged(roles)
    far_S = scores.policy_S + scale * torch.linspace(-1, 1, scores.num_sequences, dtype=torch.float64)
    far_T = scores.policy_T + scale * torch.linspace(-1, 1, scores.num_tokens, dtype=torch.float64)
    out, gradient = evaluate(replace(scores, policy_S=far_S, policy_T=far_T), cfg)
    assert out.loss.isfinite() and gradient.isfinite().all()
    assert gradient.abs().max() < 1e19  # its square fits an fp32 norm


@every_loss
def test_a_share_without_sequences_is_zero(raw, roles):
    cfg = choose_loss(raw)
    scores = prepared(ragged(roles), cfg)
    out, gradient = evaluate(part(scores, torch.zeros(scores.num_sequences, dtype=torch.bool)), cfg)
    assert out.loss.item() == 0 and gradient.numel() == 0


@every_token_loss
def test_single_precision_log_probs_are_summed_in_double(raw, roles):
    cfg, scores = choose_loss(raw), ragged(roles)
    single = {name: getattr(scores, name).float() for name in ("policy_T", "old_T", "reference_T")}
    double = {name: value.double() for name, value in single.items()}
    from_single, gradient = evaluate(replace(scores, **single), cfg)
    from_double, _ = evaluate(replace(scores, **double), cfg)
    assert gradient.dtype == torch.float32
    assert from_single.loss.item() == from_double.loss.item()
