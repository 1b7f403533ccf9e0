"""Tensor ranks of the DeepSpeed engine: families without tables, and checkpoints that change layout on their way."""

import pytest
import torch
import transformers

from megalign.convert.hf.auto_model import meta_model
from megalign.convert.zero.source import ZeroSource
from megalign.engines.deepspeed.plan import plan_problem
from tests.support.auto_checkpoints import SIZES, TOKENS, write_auto_checkpoint
from tests.support.compare import relative
from tests.support.parity_cases import write_checkpoints
from tests.support.processes import run_ranks
from tests.support.tensor_cases import SETUPS, TensorSetup, auto_answer, run_auto, run_resumed, run_whole
from tests.support.tiny_jobs import save_drawn

SETUP = pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
AUTO = ("phi", "gpt_neox", "starcoder2", "cohere2", "exaone4")  # the last one's plan sums gradients of head norms


def write_case(folder, name):
    """Write a checkpoint of `auto_checkpoints`, or of a family that only these tests have."""
    if name != "exaone4":
        return write_auto_checkpoint(folder, name)
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(name, **{**TOKENS, **SIZES, "sliding_window": 5})
    save_drawn(transformers.AutoModelForCausalLM.from_config(config), folder)
    return folder


@pytest.fixture(scope="module")
def auto_results(tmp_path_factory):
    """Results of families that the tables lack, and their answers."""
    folder = tmp_path_factory.mktemp("auto")
    for name in AUTO:
        write_case(folder / name, name)
    found = {}
    for data in (1, 2):
        setups = [setup for setup in SETUPS if setup.data == data]
        run_ranks(run_auto, 2 * data, folder, setups, AUTO)
        found |= torch.load(folder / f"auto {2 * data}.pt", weights_only=False)
    return found, {name: auto_answer(folder / name) for name in AUTO}


@SETUP
@pytest.mark.parametrize("name", AUTO)
def test_a_family_without_tables(auto_results, setup, name):
    result, answer = auto_results[0][setup, name], auto_results[1][name]
    for (value, norm), (right_value, right_norm) in zip(result["steps"], answer["steps"], strict=True):
        assert relative(value, right_value) < 1e-5
        assert relative(norm, right_norm) < 1e-4
    for kind in ("gradients", "weights"):
        whole = torch.cat([each.flatten() for each in answer[kind].values()]).norm()
        for key, right in answer[kind].items():
            published = "embed_out.weight" if name == "gpt_neox" and key == "lm_head.weight" else key
            gap = float((result[kind].pop(published).double() - right).norm())
            assert gap < 1e-4 * max(float(right.norm()), 1e-3 * float(whole)), f"{kind} {key}"
        assert not result[kind]
    assert result["note"] == "sequences run as packed rows"


REFUSED = {
    "stablelm": ({}, 2, "transformers has no tensor-parallel plan for StableLmForCausalLM"),
    "olmoe": ({}, 2, "plan for OlmoeForCausalLM has colwise_gather_output, which is not implemented here"),
    "mixtral": ({}, 2, "plan for MixtralForCausalLM has moe_tp_experts, which is not implemented here"),
    "phi": ({"qk_layernorm": True}, 2, "a part of the gradient of layers.0.self_attn.q_layernorm.weight of PhiForC"),
    "cohere2": ({}, 3, "it does not divide the 16 rows of layers.0.self_attn.k_proj"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_split_exactly_is_refused(tmp_path, name):
    changes, size, reason = REFUSED[name]
    model = meta_model(write_auto_checkpoint(tmp_path, name, **changes))
    problem = plan_problem(model, size)
    assert problem is not None and reason in problem, problem


def test_a_model_with_a_plan_is_not_refused(tmp_path):
    for name in AUTO:
        assert plan_problem(meta_model(write_case(tmp_path / name, name)), 2) is None


RESUMED = [("llama-tied/policy", None), ("qwen2/policy", "q_proj v_proj down_proj"), ("starcoder2", None)]
WAYS = {
    "split, more data ranks, whole": (TensorSetup(2, 1, 1), TensorSetup(2, 2, 3), TensorSetup(1, 2, 2)),
    "whole, split": (TensorSetup(1, 2, 3), TensorSetup(2, 1, 2), TensorSetup(2, 1, 3)),
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Three steps with a checkpoint and another layout or stage after each, and without."""
    folder = tmp_path_factory.mktemp("resumed")
    for way, setups in WAYS.items():
        for name in ("llama-tied", "qwen2"):
            write_checkpoints(folder / way, name)
        write_auto_checkpoint(folder / way / "starcoder2", "starcoder2")
        for number, setup in enumerate(setups):
            run_ranks(run_resumed, setup.tensor * setup.data, folder / way, setup, RESUMED, number)
    run_ranks(run_whole, 1, folder / way, RESUMED)
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", [model for model, _ in RESUMED])
def test_a_checkpoint_is_resumed_in_another_layout(resumed, way, model):
    name = model.replace("/", " ")
    found, right = torch.load(resumed / way / name / "2.pt"), torch.load(resumed / "whole, split" / f"{name} whole.pt")
    for mine, theirs in zip(found["steps"], right["steps"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert found["tensors"].keys() == right["tensors"].keys()
    for key, tensor in right["tensors"].items():
        # B begins at zero, where a step of AdamW is a sign that magnifies rounding.
        assert relative(found["tensors"][key], tensor) < (1e-4 if ".lora_" in key else 1e-5), key
    halfway = torch.load(resumed / way / name / "1.pt")["tensors"]
    source, frozen = ZeroSource(resumed / way / name / "1" / "zero"), 0
    for key, tensor in halfway.items():
        stored = key.replace(".lora_A", ".lora_A.default").replace(".lora_B", ".lora_B.default")
        if stored in source.specs:
            assert torch.equal(source.weight(stored), tensor), key
        else:
            frozen += 1
    assert frozen == 0 or "qwen2" in model
