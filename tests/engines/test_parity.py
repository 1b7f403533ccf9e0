"""The promise: loss and gradient of a step are those of the float64 answer, however the work is cut."""

from __future__ import annotations

import pytest
import torch

from tests.support.compare import assert_same_steps, relative
from tests.support.loss_cases import COUPLED
from tests.support.parity_cases import ALONE, SMALL, parity_cases, trajectories
from tests.support.parity_layouts import DEFAULT, EXPERTS, LAYOUTS


def with_slow(rows):
    """Parameters that begin with a layout; all but the default layouts are slow."""
    return [pytest.param(*row, marks=() if row[0] in DEFAULT else pytest.mark.slow) for row in rows]


LAYOUT = pytest.mark.parametrize("layout", with_slow([(name,) for name in LAYOUTS]))

# What losses report of the distributions.
REPORTED = {loss: {"entropy"} for loss in ("grpo", "dr_grpo", "dapo", "rloo", "gvpo")}
REPORTED |= {loss: {"token_accuracy"} for loss in ("sft", "poft")}


@pytest.mark.parametrize(
    "layout, loss",
    with_slow([(name, loss) for name in LAYOUTS for loss in sorted({case.loss for case in parity_cases(name)})]),
)
def test_loss_and_gradient_norm(results, answers, layout, loss):
    cases = [case for case in parity_cases(layout) if case.loss == loss]
    assert len(cases) >= 2
    for case in cases:
        result, answer = results(layout)["parity"][case.key], answers.step(case.model, loss)
        assert relative(result["loss"], answer["loss"]) < 1e-5, case.key
        assert relative(result["grad_norm"], answer["grad_norm"]) < 1e-4, case.key
        assert relative(result["policy_S"], answer["policy_S"]) < 1e-6, case.key
        assert relative(result["coefficient_S"], answer["coefficient_S"]) < 1e-4, case.key
        assert result["same_on_all_ranks"], case.key
        reported = [("entropy", 0), ("token_accuracy", 1)]
        seen = {name: answer["means"][place] for name, place in reported if name in result["metrics"]}
        assert seen.keys() == REPORTED.get(loss, set()), case.key
        for name, right in seen.items():
            assert result["metrics"][name] == pytest.approx(right, rel=1e-5, abs=1e-9), f"{case.key} {name}"


@LAYOUT
def test_gradient_of_every_parameter(results, answers, layout):
    # A key bias hardly matters, because softmax ignores what all keys share but for the rotation: where little is left
    # of large terms, their rounding is measured against a thousandth of the whole gradient.
    for case in [case for case in parity_cases(layout) if case.gradients]:
        gradients, answer = results(layout)["parity"][case.key]["gradients"], answers.step(case.model, case.loss)
        assert gradients.keys() == answer["gradients"].keys()
        for name, gradient in answer["gradients"].items():
            size = max(float(gradient.norm()), 1e-3 * answer["grad_norm"])
            assert float((gradients[name].double() - gradient).norm()) < 1e-4 * size, f"{case.key} {name}"


@LAYOUT
def test_the_cheapest_exact_mode_is_taken(results, layout):
    for case in parity_cases(layout):
        result = results(layout)["parity"][case.key]
        split = case.loss in COUPLED and case.budget in (SMALL, ALONE[0])
        split = split or case.model in EXPERTS  # the experts' shares of tokens come from pass 1
        assert result["pass_mode"] == ("two_pass" if split else "single_pass"), case.key
        assert result["pass_gap"] == (0.0 if split else None), case.key


@pytest.mark.parametrize(
    "layout, model, loss", with_slow([(name, *one) for name in LAYOUTS for one in trajectories(name)])
)
def test_three_adamw_steps(results, answers, layout, model, loss):
    result, answer = results(layout)["trajectory"][f"{model} {loss}"], answers.trajectory(model, loss)
    assert_same_steps(result, answer)
    # On several stages a tied head is a copy of the embedding that must have moved with it.
    tied = "lm_head.weight" not in answer["weights"]
    home = "model.embed_tokens.weight" if tied else "lm_head.weight"
    for copy in result["heads"].values():
        assert torch.equal(copy, result["weights"][home])
    assert bool(result["heads"]) == (LAYOUTS[layout].pipeline > 1 or not tied)
