"""Pass modes, scores, recomputation, adapters and bf16 through the DeepSpeed engine."""

from __future__ import annotations

import pytest
import torch

from tests.support.compare import distances, relative
from tests.support.deepspeed_cases import DEFAULT, MODES, SETUPS, WIDE
from tests.support.lora_answers import LORA_A, LORA_B, lora_answer
from tests.support.loss_cases import LOSSES, OLD
from tests.support.parity_cases import ADAPTER_LR, ADAPTERS, EXTREMES, Case, by_mode

SETUP = pytest.mark.parametrize("setup", WIDE)
# bf16 keeps 8 bits: each rounding is off by up to 2**-9 of a value, and a token's log-prob meets some hundred of them
# one after another, so by 10 x 2**-9 = 0.02 if signs are random. The loss holds squares of sums of such log-probs, and
# a gradient products of them.
BF16_LOSS, BF16_COSINE = 0.05, 0.99


@pytest.mark.parametrize("loss", MODES)
@SETUP
def test_modes_give_the_same_gradient(zero_results, setup, loss):
    modes = zero_results(setup)["modes"]
    for cutting in EXTREMES:
        key = Case("llama", loss, *cutting).key
        two_pass, others = by_mode(modes, loss, cutting)
        if loss in OLD:
            others += [modes[f"{key} on_policy {name}"] for name in ("known_scores", "cheapest")]
            two_pass_of = {id(one): modes[f"{key} on_policy two_pass"] for one in others[-2:]}
        else:
            two_pass_of = {}
        for other in others:
            right = two_pass_of.get(id(other), two_pass)
            assert other["loss"] == pytest.approx(right["loss"], rel=1e-6, abs=1e-9)
            assert relative(other["coefficient_S"], right["coefficient_S"]) < 1e-6
            for name, gradient in right["gradients"].items():
                assert relative(other["gradients"][name], gradient) < 2e-6, f"{key} {name}"


@pytest.mark.parametrize("setup", [name for name in DEFAULT if SETUPS[name].stage == 3])
def test_scores_of_an_engine_that_only_scores(zero_results, zero_answers, setup):
    scores = zero_results(setup)["score"]
    for loss, (_, kind) in LOSSES.items():
        logp, lse = zero_answers.policy("llama", kind)
        assert relative(scores[loss]["loss"], zero_answers.step("llama", loss)["loss"]) < 1e-5
        assert scores[loss]["same_on_all_ranks"]
        rows = zip(scores[kind]["by_token"], logp, lse, strict=True)
        for (total, logp_N, lse_N), right_logp, right_lse in rows:
            assert relative(total, right_logp.detach().sum()) < 1e-6
            assert relative(logp_N, right_logp.detach()) < 3e-6
            assert relative(lse_N, right_lse.detach()) < 3e-6


@SETUP
def test_changing_numbers_of_micro_batches_with_scores_between(zero_results, setup):
    """No parameter that a scoring pass left gathered, or an earlier step's gradient, is seen again."""
    result, other = zero_results(setup)["uneven"], zero_results(WIDE[0])["uneven"]
    assert len({number for number, _, _ in result["steps"]}) > 2
    for (_, loss, norm), (_, right_loss, right_norm) in zip(result["steps"], other["steps"], strict=True):
        assert loss == pytest.approx(right_loss, rel=1e-5, abs=1e-7) and norm == pytest.approx(right_norm, rel=1e-4)
    for mine, theirs in zip(result["scores"], other["scores"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    assert result["last"] == result["scores"][-1]
    assert result["partitioned"] == (1.0 if SETUPS[setup].stage == 3 else 0.0), "a scorer shares the memory plan"
    assert result["gap"] == 0.0, "a fresh engine scores the exported weights otherwise"


@pytest.mark.parametrize("recompute", ["selective", "full"])
@SETUP
def test_recomputation_changes_no_gradient(zero_results, setup, recompute):
    kept, recomputed = (zero_results(setup)["recompute"][key] for key in ("none", recompute))
    assert recomputed["loss"] == kept["loss"]
    for name, gradient in kept["gradients"].items():
        assert relative(recomputed["gradients"][name], gradient) < 1e-6, name


@pytest.fixture(scope="module")
def lora_right(zero_answers, zero_results):
    """The steps of `peft` in float64."""
    return lora_answer(zero_answers, "deep", zero_results(WIDE[0])["lora"]["shapes"])


@SETUP
def test_adapters_begin_as_on_megatron(results, zero_results, setup):
    found, theirs = zero_results(setup)["lora"], results("one")["lora"]
    assert found["few"].keys() == theirs["few"].keys()
    assert all(torch.equal(found["few"][name], tensor) for name, tensor in theirs["few"].items())
    assert found["begun"]["policy_S"] == found["base"]["policy_S"] and found["begun"]["loss"] == found["base"]["loss"]
    assert found["off"], "switched off they leave the base's log-probs"
    assert found["shapes"] == theirs["shapes"]


@SETUP
def test_adapters_train_as_in_peft(zero_results, lora_right, setup):
    result = zero_results(setup)["lora"]
    for way in ("gradients", "full"):
        for name, distance in distances(result[way], lora_right["gradients"]).items():
            assert distance < 1e-4, f"{way} {name}"
    for (loss, norm), (right_loss, right_norm) in zip(result["steps"], lora_right["steps"], strict=True):
        assert loss == pytest.approx(right_loss, rel=1e-5) and norm == pytest.approx(right_norm, rel=1e-4)
    assert result["full next"] == pytest.approx(lora_right["steps"][1][0], rel=1e-5)
    for name, right in lora_right["adapters"].items():
        moved = (result["adapters"][name].double() - right).abs().max()
        assert moved < 0.02 * ADAPTER_LR, f"{name} is {moved} off after steps of {ADAPTER_LR}"


@SETUP
def test_merged_weights(zero_results, zero_answers, setup):
    """W + scale B A for what has adapters, and the base's bits for all else."""
    result, model = zero_results(setup)["lora"], zero_answers.model("deep")
    base = dict(model.named_parameters())
    assert result["weights"].keys() == base.keys()
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        if module + LORA_A not in result["adapters"]:
            assert torch.equal(result["weights"][name].double(), weight.detach()), name
            continue
        a, b = (result["adapters"][module + suffix].double() for suffix in (LORA_A, LORA_B))
        merged = weight.detach() + ADAPTERS.alpha / ADAPTERS.rank * b @ a
        assert (result["weights"][name].double() - merged).norm() < 1e-6 * merged.norm(), name
        assert (result["weights"][name].double() - weight).norm() > 0.01 * merged.norm(), name


@SETUP
def test_bf16_keeps_fp32_master_weights(zero_results, zero_answers, setup):
    run, answer = zero_results(setup)["bf16"], zero_answers.step("llama", "gvpo")
    assert {tensor.dtype for tensor in run["last"].values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in run["gradients"].values()} == {torch.float32}
    assert relative(run["losses"][0], answer["loss"]) < BF16_LOSS
    assert relative(run["norms"][0], answer["grad_norm"]) < BF16_LOSS
    mine, theirs = (
        torch.cat([one[name].flatten().double() for name in answer["gradients"]])
        for one in (run["gradients"], answer["gradients"])
    )
    assert torch.cosine_similarity(mine, theirs, dim=0) > BF16_COSINE
    assert run["losses"][-1] < 0.7 * run["losses"][0]
    before, first, last = (
        torch.cat([run[key][name].flatten() for name in run["before"]]) for key in ("before", "first", "last")
    )
    # Weights in [1/8, 1/4) are 2**-10 apart, so a step of 1e-4 moves none of them, nor do ten without masters.
    wide = (before.abs() >= 0.13) & (before.abs() < 0.25)
    assert torch.equal(first[wide], before[wide])
    assert (last[wide] != before[wide]).float().mean() > 0.2


@SETUP
def test_bf16_steps_beside_skipped_ones_are_the_same_to_the_bit(zero_results, setup):
    skipped, other = (zero_results(setup)[name] for name in ("bf16 skipped", "bf16 not skipped"))
    assert not torch.isfinite(torch.tensor(skipped["norms"])).any()
    assert all(same for _, _, same in skipped["steps"]), "a skipped step moved weights"
    assert [(loss, norm) for loss, norm, _ in skipped["steps"]] == other["steps"]
    assert all(torch.equal(skipped["weights"][name], weight) for name, weight in other["weights"].items())
    assert skipped["rate 0 moves nothing"]


@pytest.mark.parametrize("setup", [name for name in DEFAULT if SETUPS[name].split])
def test_a_head_is_gathered_once_a_micro_batch(zero_results, setup):
    for model, passes in zero_results(setup)["gathers"].items():
        for name, (batches, gathers) in passes.items():
            # A tied one is released after the embedding, which is long before the head.
            times = 2 if model == "llama-tied" else 1
            assert batches > 1 and gathers == times * batches, f"{model} {name}"
