"""Scores, pass modes, recomputation and bf16 through the real engine."""

from __future__ import annotations

import pytest
import torch

from tests.support.compare import relative
from tests.support.loss_cases import LOSSES, OLD
from tests.support.parity_cases import (
    CAPPED,
    EXTREMES,
    HEAD_WAYS,
    HEADS,
    LARGE,
    MODES,
    OVERLAPPED,
    RECOMPUTED,
    REPEATED,
    Case,
    by_mode,
)


@pytest.mark.parametrize("layout, loss", [(layout, loss) for layout, losses in MODES.items() for loss in losses])
def test_modes_give_the_same_gradient(results, layout, loss):
    modes = results(layout)["modes"]
    for cutting in EXTREMES:
        key = Case("llama", loss, *cutting).key
        two_pass, others = by_mode(modes, loss, cutting)
        for other in others:
            assert relative(other["loss"], two_pass["loss"]) < 1e-6
            assert relative(other["coefficient_S"], two_pass["coefficient_S"]) < 1e-6
            assert other["metrics"] == pytest.approx(two_pass["metrics"], rel=1e-6, nan_ok=True)
            for name, gradient in two_pass["gradients"].items():
                assert relative(other["gradients"][name], gradient) < 2e-6, f"{key} {name}"


ON_POLICY = [(layout, loss) for layout, losses in MODES.items() for loss in losses if loss in OLD]


@pytest.mark.parametrize("layout, loss", ON_POLICY)
def test_on_policy_the_step_is_its_own_old_policy(results, layout, loss):
    """Every mode gives the gradient of a step that was handed the present policy's log-probs as the old ones."""
    modes = results(layout)["modes"]
    for cutting in EXTREMES:
        key = Case("llama", loss, *cutting).key
        given = modes[f"{key} old_given"]
        # RLOO's penalty is made of old sums of whole groups, which some micro-batches do not hold.
        cheapest = "two_pass" if loss == "rloo" and cutting[0] != LARGE else "single_pass"
        for mode, name in (("two_pass", "two_pass"), ("known_scores", "known_scores"), (cheapest, "cheapest")):
            fresh = modes[f"{key} on_policy {name}"]
            assert fresh["pass_mode"] == mode and fresh["same_on_all_ranks"]
            assert fresh["metrics"]["clip_fraction"] == 0.0
            assert fresh["loss"] == pytest.approx(given["loss"], rel=1e-6, abs=1e-9)
            assert relative(fresh["coefficient_S"], given["coefficient_S"]) < 1e-6
            for metric in given["metrics"]:  # kl is what is left of sums of tens of nats
                assert fresh["metrics"][metric] == pytest.approx(given["metrics"][metric], rel=1e-5, abs=2e-6)
            for parameter, gradient in given["gradients"].items():
                assert relative(fresh["gradients"][parameter], gradient) < 2e-6, f"{key} {name} {parameter}"


@pytest.mark.parametrize("layout", ["one", "dp2", "tp2xpp2"])
def test_scores_of_an_engine_that_only_scores(results, answers, layout):
    scores = results(layout)["score"]
    for loss, (_, kind) in LOSSES.items():
        logp, lse = answers.policy("llama", kind)
        assert relative(scores[loss]["loss"], answers.step("llama", loss)["loss"]) < 1e-5
        assert scores[loss]["same_on_all_ranks"]
        by_token, totals = scores[kind]["by_token"], scores[kind]["totals"]
        for (total, logp_N, lse_N), (again, *kept), right_logp, right_lse in zip(
            by_token, totals, logp, lse, strict=True
        ):
            assert relative(total, right_logp.detach().sum()) < 1e-6
            assert (total, [None, None]) == (again, kept)
            assert relative(logp_N, right_logp.detach()) < 3e-6
            assert relative(lse_N, right_lse.detach()) < 3e-6


@pytest.mark.parametrize("layout", RECOMPUTED)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_gradient(results, layout, recompute):
    kept, recomputed = (results(layout)["recompute"][key] for key in ("none", recompute))
    assert recomputed["loss"] == kept["loss"]
    for name, gradient in kept["gradients"].items():
        assert relative(recomputed["gradients"][name], gradient) < 1e-6, name


def test_bf16_keeps_fp32_master_weights(results, answers):
    run = results("tp2")["bf16"]
    assert {tensor.dtype for tensor in run["last"].values()} == {torch.bfloat16}
    # 8 bits a weight, some hundred roundings a token: per cents of a loss made of differences
    assert relative(run["losses"][0], answers.step("llama", "gvpo")["loss"]) < 0.05
    assert run["losses"][-1] < 0.7 * run["losses"][0]
    before, first, last = (
        torch.cat([run[key][name].flatten() for name in run["before"]]) for key in ("before", "first", "last")
    )
    # Weights in [1/8, 1/4) are 2**-10 apart, so a step of 1e-4 moves none of them, nor do ten without masters.
    wide = (before.abs() >= 0.13) & (before.abs() < 0.25)
    assert torch.equal(first[wide], before[wide])
    assert (last[wide] != before[wide]).float().mean() > 0.2


@pytest.mark.parametrize("layout", HEADS)
def test_every_way_to_compute_a_head_gives_the_right_gradient(results, answers, layout):
    # Overlap: Megatron's hooks wait for a gradient of a head whose own is in main_grad already, tied or not.
    for name, (model, _) in HEAD_WAYS.items():
        for loss in ("sft", "gvpo"):
            result = results(layout)["heads"][f"{name} {loss}"]
            cap = {"scale": CAPPED["logit_scale"], "cap": CAPPED["logit_softcap"]}
            answer = answers.capped_step(model, loss, **cap) if name == "capped" else answers.step(model, loss)
            assert relative(result["loss"], answer["loss"]) < 1e-5, f"{name} {loss}"
            assert result["gradients"].keys() == answer["gradients"].keys()
            for key, gradient in answer["gradients"].items():
                assert relative(result["gradients"][key], gradient) < 1e-4, f"{name} {loss} {key}"


@pytest.mark.parametrize("layout, model", OVERLAPPED.items())
def test_overlapped_reductions_and_gathers_change_no_step(results, answers, layout, model):
    # Scoring comes first in a step: it must wait for the weights of the last update.
    result, answer = results(layout)["overlap"], answers.trajectory(model, "gvpo")
    for (value, norm), (right_value, right_norm) in zip(result["steps"], answer["steps"], strict=True):
        assert relative(value, right_value) < 1e-5
        assert relative(norm, right_norm) < 1e-4
    for name, weight in answer["weights"].items():
        assert relative(result["weights"][name], weight) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", REPEATED)
def test_the_same_layout_twice_gives_the_same_bits(results, layout, dtype):
    first, again = (results(layout)["repeated"][f"{dtype} {turn}"] for turn in ("first", "again"))
    for (loss, gradients, norm), (other_loss, other_gradients, other_norm) in zip(
        first["steps"], again["steps"], strict=True
    ):
        assert (loss, norm) == (other_loss, other_norm)
        assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)
    assert first["steps"][0][0] != first["steps"][1][0], "the steps did nothing"
    assert {tensor.dtype for tensor in first["weights"].values()} == {dtype}
    assert all(torch.equal(first["weights"][name], again["weights"][name]) for name in first["weights"])
