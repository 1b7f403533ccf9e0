"""The registry, group statistics and clipping that losses are made of."""

from __future__ import annotations

import math

import pytest
import torch

from megalign.losses import LOSSES, choose_loss
from megalign.losses.clipping import LARGEST_LOG_RATIO, bounded_exp
from megalign.losses.group_means import (
    center_by_group,
    group_logsumexp,
    group_sum,
    implicit_reward_fit,
    sequences_per_group,
)
from megalign.schema import UserError

ALL = ["dpo", "epa", "grpo", "gvpo", "orpo", "poft", "rloo", "sft", "simpo"]
GROUP_S = torch.tensor([2, 0, 2, 0, 2])  # group 1 has nobody here
VALUE_S = torch.tensor([1.0, 10.0, 2.0, 30.0, 6.0], dtype=torch.float64)


def test_every_loss_is_registered_under_its_name():
    assert sorted(LOSSES) == ALL
    for name, entry in LOSSES.items():
        required = {"max_response_length": 8, "variant": "dr_grpo"} if name == "grpo" else {}
        assert choose_loss({"name": name, **required}) == entry.config(**required)
        assert choose_loss(entry.config(**required)).name == name


@pytest.mark.parametrize(
    "name, pairing, level, coupled, reference, old, teachers",
    [
        ("sft", "single", "token", False, False, False, False),
        ("poft", "single", "sequence", False, False, False, True),
        ("dpo", "preference", "sequence", True, True, False, False),
        ("simpo", "preference", "sequence", True, False, False, False),
        ("orpo", "preference", "sequence", True, False, False, False),
        ("epa", "contrast", "sequence", True, True, False, False),
        ("grpo", "samples", "token", False, False, True, False),
        ("rloo", "samples", "sequence", False, True, True, False),
        ("gvpo", "samples", "sequence", True, True, False, False),
    ],
)
def test_traits(name, pairing, level, coupled, reference, old, teachers):
    traits = choose_loss({"name": name}).traits()
    assert (traits.pairing.kind, traits.level, traits.coupled) == (pairing, level, coupled)
    assert (traits.reference, traits.old, traits.teachers) == (reference, old, teachers)


@pytest.mark.parametrize(
    "raw, line",
    [
        ("gvpo", "loss.name is missing"),
        ({}, "loss.name is missing"),
        (
            {"name": "ppo"},
            f"loss.name is 'ppo'; must be one of {', '.join(ALL)}, or module:function",
        ),
        ({"name": ["gvpo"]}, r"loss.name is \['gvpo'\]"),
        ({"name": "gvpo", "beta": 0}, "loss.beta is 0"),
        ({"name": "gvpo", "beta": -0.1}, "loss.beta is -0.1"),
        ({"name": "gvpo", "beta": "0.1"}, "loss.beta is '0.1'"),
        ({"name": "gvpo", "beta": math.inf}, "loss.beta is inf"),
        ({"name": "gvpo", "betta": 0.1}, "loss.betta is not a known key"),
        ({"name": "sft", "beta": 0.1}, "loss.beta is not a known key"),
        ({"name": "dpo", "variant": "hinge"}, "loss.variant is 'hinge'"),
        ({"name": "orpo", "lambda": -1}, "loss.lambda is -1"),
        (
            {"name": "orpo", "lamda": 1},
            "loss.lamda is not a known key; did you mean lambda[?]; must be one of lambda, name",
        ),
        ({"name": "orpo", "weight": 1}, "loss.weight is not a known key"),
        ({"name": "simpo", "gamma": -1.0}, "loss.gamma is -1.0"),
        ({"name": "epa", "strong": 0}, "loss.strong is 0"),
        ({"name": "epa", "weak": -1}, "loss.weak is -1"),
        ({"name": "epa", "weak": 1.5}, "loss.weak is 1.5"),
        ({"name": "epa", "strong_from": "best"}, "loss.strong_from is 'best'"),
        ({"name": "grpo", "clip_low": 1.1}, "loss.clip_low is 1.1"),
        ({"name": "rloo", "beta": -1}, "loss.beta is -1"),
        ({"name": "poft", "gamma": math.nan}, "loss.gamma is nan"),
    ],
)
def test_bad_settings_are_one_line_naming_the_field(raw, line):
    with pytest.raises(UserError, match=f"^{line}") as caught:
        choose_loss(raw)
    assert "\n" not in str(caught.value)


def test_group_statistics():
    assert sequences_per_group(GROUP_S, 4).tolist() == [3, 2, 3, 2, 3]
    assert group_sum(VALUE_S, GROUP_S, 4).tolist() == [9, 40, 9, 40, 9]
    assert center_by_group(VALUE_S, GROUP_S, 4).tolist() == [-2, -10, -1, 10, 3]


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_log_of_summed_exponentials_at_any_size(shift):
    value_S = (VALUE_S + shift).requires_grad_()
    result_S = group_logsumexp(value_S, GROUP_S, 4)
    first, second = VALUE_S[[0, 2, 4]], VALUE_S[[1, 3]]
    expected = [first.logsumexp(0).item() + shift, second.logsumexp(0).item() + shift]
    assert [result_S[0].item(), result_S[1].item()] == pytest.approx(expected, rel=1e-12)
    (gradient_S,) = torch.autograd.grad(result_S[0], value_S)
    torch.testing.assert_close(gradient_S[[0, 2, 4]], first.softmax(0))
    assert gradient_S[[1, 3]].tolist() == [0, 0]


def test_fit_pools_prompts_after_centring_and_skips_unknown_rewards():
    # centred truth [-1, 1 | -2, 2], implicit [-1, 1 | 1, -1]: products 2 - 4, squares 10 and 4
    reward_S = torch.tensor([0.0, 2.0, 5.0, 9.0, math.nan], dtype=torch.float64)
    implicit_S = torch.tensor([3.0, 5.0, 1.0, -1.0, 1e6], dtype=torch.float64)
    fit = implicit_reward_fit(implicit_S, reward_S, torch.tensor([0, 0, 1, 1, 1]), 2)
    assert fit["implicit_reward_slope"].item() == pytest.approx(-2 / 10)
    assert fit["implicit_reward_correlation"].item() == pytest.approx(-2 / math.sqrt(40))


@pytest.mark.parametrize("reward", [[0.1] * 5, [math.nan] * 5, [1.0, 2.0, math.nan, math.nan, math.nan]])
def test_no_fit_without_two_known_rewards_that_differ_in_a_group(reward):
    assert implicit_reward_fit(VALUE_S, torch.tensor(reward, dtype=torch.float64), GROUP_S, 3) == {}
    assert implicit_reward_fit(VALUE_S, None, GROUP_S, 3) == {}


def test_bounded_exp_goes_on_as_its_tangent():
    value = torch.tensor([-1e6, 0.0, LARGEST_LOG_RATIO, LARGEST_LOG_RATIO + 2], dtype=torch.float64, requires_grad=True)
    result = bounded_exp(value)
    top = math.exp(LARGEST_LOG_RATIO)
    assert result.tolist() == pytest.approx([0, 1, top, 3 * top])
    assert torch.autograd.grad(result.sum(), value)[0].tolist() == pytest.approx([0, 1, top, top])
