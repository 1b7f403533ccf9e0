"""Adapters: the gradients and steps of `peft` in float64 on every axis, and the base to the bit without them."""

from __future__ import annotations

import pytest
import torch

from megalign.convert.rules import lora_target
from tests.support.compare import distances
from tests.support.lora_answers import LORA_A, LORA_B, lora_answer
from tests.support.parity_cases import ADAPTER_LR, FEW_ADAPTERS, LORA
from tests.support.parity_layouts import DEFAULT

LAYOUT = pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in LORA]
)


@pytest.fixture(scope="session")
def lora_answers(answers):
    """The answers by model, made when first asked for."""
    found = {}

    def of(model, result):
        if model not in found:
            found[model] = lora_answer(answers, model, result["shapes"])
        return found[model]

    return of


@LAYOUT
def test_adapters_that_begin_change_no_bit(results, layout):
    result = results(layout)["lora"]
    base, begun = result["base"], result["begun"]
    assert begun["policy_S"] == base["policy_S"] and begun["loss"] == base["loss"]
    assert result["off"], "switched off they leave the base's log-probs"
    named = {name.rpartition(".lora_")[0] for name in result["few"]}
    assert {lora_target(name) for name in named} == set(FEW_ADAPTERS.targets)
    for name, tensor in result["few"].items():
        if name.endswith(LORA_B):
            assert not tensor.any()
        else:
            bound = tensor.shape[1] ** -0.5
            assert tensor.abs().max() <= bound and 0.4 < tensor.std() / bound < 0.75, name


def test_adapters_begin_alike_in_every_layout(results):
    by_model = {}
    for layout, model in LORA.items():
        if layout in DEFAULT:
            by_model.setdefault(model, []).append(results(layout)["lora"]["few"])
    for first, *others in by_model.values():
        assert len({tensor.sum().item() for name, tensor in first.items() if name.endswith(LORA_A)}) == len(first) / 2
        for other in others:
            assert all(torch.equal(other[name], tensor) for name, tensor in first.items())


@LAYOUT
def test_gradients_are_those_of_peft(results, lora_answers, layout):
    result = results(layout)["lora"]
    answer = lora_answers(LORA[layout], result)
    for way in ("gradients", "full", "overlap"):
        for name, distance in distances(result[way], answer["gradients"]).items():
            assert distance < 1e-4, f"{way} {name}"


@LAYOUT
def test_three_adamw_steps(results, lora_answers, answers, layout):
    result, model = results(layout)["lora"], LORA[layout]
    answer = lora_answers(model, result)
    for (loss, norm), (right_loss, right_norm) in zip(result["steps"], answer["steps"], strict=True):
        assert loss == pytest.approx(right_loss, rel=1e-5) and norm == pytest.approx(right_norm, rel=1e-4)
    for way in ("full", "overlap"):
        assert result[f"{way} next"] == pytest.approx(answer["steps"][1][0], rel=1e-5)
    for name, right in answer["adapters"].items():
        moved = (result["adapters"][name].double() - right).abs().max()
        assert moved < 0.02 * ADAPTER_LR, f"{name} is {moved} off after steps of {ADAPTER_LR}"


@LAYOUT
def test_merged_weights(results, answers, layout):
    """W + scale B A for what has adapters, and the base's bits for all else."""
    from tests.support.oracle import as_stored
    from tests.support.parity_cases import ADAPTERS

    result, model = results(layout)["lora"], answers.model(LORA[layout])
    base = as_stored(model, dict(model.named_parameters()))
    assert result["weights"].keys() == base.keys()
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        merged = weight.detach()
        if module + LORA_A in result["adapters"]:
            a, b = (result["adapters"][module + suffix].double() for suffix in (LORA_A, LORA_B))
            merged = merged + ADAPTERS.alpha / ADAPTERS.rank * b @ a
            assert (result["weights"][name].double() - merged).norm() < 1e-6 * merged.norm(), name
            assert (result["weights"][name].double() - weight).norm() > 0.01 * merged.norm(), name
        else:
            assert torch.equal(result["weights"][name].double(), merged), name


def test_bf16_adapters_pull_the_same_way(results, lora_answers):
    right = lora_answers("deep", results("tp2")["lora"])["gradients"]
    found = results("tp2")["bf16 lora"]
    mine, theirs = (torch.cat([one[name].flatten().double() for name in right]) for one in (found, right))
    assert torch.cosine_similarity(mine, theirs, dim=0) > 0.99
