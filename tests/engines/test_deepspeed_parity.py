"""The promise on the DeepSpeed engine: loss and gradient of a step are those of the float64 answer."""

from __future__ import annotations

import pytest
import torch

from tests.support.compare import assert_same_steps, relative
from tests.support.deepspeed_cases import DEFAULT, SETUPS, TRAJECTORIES, WIDE, cases_of
from tests.support.loss_cases import COUPLED
from tests.support.parity_cases import ALONE, SMALL

SETUP = pytest.mark.parametrize("setup", DEFAULT)
WHOLE = [
    pytest.param(name, whole, marks=pytest.mark.slow if whole else ())
    for whole in (False, True)
    for name in SETUPS
    if whole or name in DEFAULT
]


@pytest.mark.parametrize("setup, whole", WHOLE)
def test_loss_and_gradient_norm(zero_results, zero_answers, setup, whole):
    parity = zero_results(setup, whole=whole)["parity"]
    for case in cases_of(setup, whole=whole):
        result, answer = parity[case.key], zero_answers.step(case.model, case.loss)
        assert relative(result["loss"], answer["loss"]) < 1e-5, case.key
        assert relative(result["grad_norm"], answer["grad_norm"]) < 1e-4, case.key
        assert relative(result["policy_S"], answer["policy_S"]) < 1e-6, case.key
        assert relative(result["coefficient_S"], answer["coefficient_S"]) < 1e-4, case.key
        assert result["same_on_all_ranks"], case.key
        split = case.loss in COUPLED and case.budget in (SMALL, ALONE[0])
        assert result["pass_mode"] == ("two_pass" if split else "single_pass"), case.key
        assert result["pass_gap"] == (0.0 if split else None), case.key


@pytest.mark.parametrize("setup, whole", WHOLE)
def test_gradient_of_every_parameter(zero_results, zero_answers, setup, whole):
    # A key bias hardly matters: what is left of large terms is measured against a thousandth of the whole gradient.
    parity = zero_results(setup, whole=whole)["parity"]
    for case in [case for case in cases_of(setup, whole=whole) if case.gradients]:
        gradients, answer = parity[case.key]["gradients"], zero_answers.step(case.model, case.loss)
        assert gradients.keys() == answer["gradients"].keys()
        for name, gradient in answer["gradients"].items():
            size = max(float(gradient.norm()), 1e-3 * answer["grad_norm"])
            assert float((gradients[name].double() - gradient).norm()) < 1e-4 * size, f"{case.key} {name}"


@pytest.mark.parametrize("model, loss", TRAJECTORIES)
@pytest.mark.parametrize("setup, whole", WHOLE)
def test_three_adamw_steps(zero_results, zero_answers, setup, whole, model, loss):
    result = zero_results(setup, whole=whole)["trajectory"][f"{model} {loss}"]
    answer = zero_answers.trajectory(model, loss)
    assert_same_steps(result, answer)


@pytest.mark.parametrize("model, loss", TRAJECTORIES)
@pytest.mark.parametrize("setup", WIDE)
def test_steps_are_those_of_the_megatron_engine(results, zero_results, setup, model, loss):
    mine = zero_results(setup)["trajectory"][f"{model} {loss}"]
    theirs = results("one")["trajectory"][f"{model} {loss}"]
    assert_same_steps(mine, theirs)


@SETUP
def test_a_norm_that_is_not_finite_skips_the_step(zero_results, zero_answers, setup):
    result, answer = zero_results(setup)["skipped"], zero_answers.trajectory("llama-tied", "gvpo")
    assert not torch.isfinite(torch.tensor(result["norms"])).any()
    for (value, norm, same), (right_value, right_norm) in zip(result["steps"], answer["steps"], strict=True):
        assert same, "the skipped step moved weights"
        assert relative(value, right_value) < 1e-5 and relative(norm, right_norm) < 1e-4
    for name, weight in answer["weights"].items():
        assert relative(result["weights"][name], weight) < 1e-5, name
    assert result["rate 0 moves nothing"]
