"""Checkpoints of the DeepSpeed engine become Hugging Face directories, bit by bit; adapters are merged as PEFT does."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file

from megalign.commands import export, verify
from megalign.convert.report import compare
from megalign.convert.transfer import ConversionOptions, megatron_to_hf
from tests.support.auto_checkpoints import AUTO_CASES, write_auto_checkpoint
from tests.support.checkpoint_dirs import FACTS_OF_RUN, describe_files
from tests.support.families import FAMILY_CASES, write_family
from tests.support.tiny_checkpoints import write_checkpoint
from tests.support.zero_checkpoints import write_run

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT's, for GPT-2's transposed layers
CASES = ("qwen2", "mixtral", "deepseek-v3", "gpt2", "olmoe", "stablelm")
TARGETS = {"gpt2": ["c_attn", "c_proj"], "stablelm": ["q_proj", "down_proj"]}


def written(folder: Path, case: str) -> Path:
    """A tiny checkpoint of a family in our tables or not."""
    if case in AUTO_CASES and case != "mixtral":
        return write_auto_checkpoint(folder, case)
    return write_family(folder, case, dtype=torch.bfloat16) if case in FAMILY_CASES else write_checkpoint(folder, case)


def trained(hf_dir: Path) -> dict[str, torch.Tensor]:
    """The parameters of a directory's model, by transformers' names, tied ones once; no buffers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_dir)
    return dict(model.named_parameters())


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(a: Path, b: Path) -> None:
    left, right = stored(a), stored(b)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name
    assert (a / "config.json").read_bytes() == (b / "config.json").read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_export_is_the_directory_that_was_trained(tmp_path, case):
    hf_dir = written(tmp_path / "hf", case)
    run = write_run(tmp_path / "run" / "checkpoints" / "step_00000003", hf_dir, trained(hf_dir))
    megatron_to_hf(run, tmp_path / "out", ConversionOptions(workers=2, max_shard_bytes=40_000))
    same(hf_dir, tmp_path / "out")
    assert compare(run, hf_dir).differences == []


@pytest.mark.parametrize("case", ["qwen2", "deepseek-v3", "olmoe"])
def test_another_dtype(tmp_path, case):
    hf_dir = written(tmp_path / "hf", case)
    megatron_to_hf(write_run(tmp_path / "run", hf_dir, trained(hf_dir)), tmp_path / "out", dtype=torch.float16)
    kept = {name for name in stored(hf_dir) if name.endswith("e_score_correction_bias")}
    for name, tensor in stored(tmp_path / "out").items():
        assert tensor.dtype == (torch.float32 if name in kept else torch.float16), name
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float16"


def adapted(hf_dir: Path, targets: list[str]) -> dict[str, torch.Tensor]:
    """Random adapters of a model, by their names in it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_dir)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=targets), model)
    random = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(parameter.shape, generator=random) * 0.2
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


@pytest.mark.parametrize("case", TARGETS)
def test_adapters_are_merged_and_written_beside(tmp_path, case):
    hf_dir = written(tmp_path / "hf", case)
    adapters = {"rank": 3, "alpha": 6.0, "targets": TARGETS[case]}
    values = adapted(hf_dir, TARGETS[case])
    run = write_run(tmp_path / "run", hf_dir, values, adapters=adapters, base="as/the/run/named/it")
    megatron_to_hf(run, tmp_path / "out")
    tokens = torch.arange(20).reshape(2, 10)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(hf_dir)
    with torch.no_grad():
        without = base(tokens).logits
        separate = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
        torch.testing.assert_close(merged(tokens).logits, separate(tokens).logits, rtol=1e-4, atol=1e-4)
        assert (merged(tokens).logits - without).abs().max() > 0.1
    untouched = [name for name in stored(hf_dir) if not any(target in name for target in TARGETS[case])]
    assert untouched and all(torch.equal(stored(hf_dir)[name], stored(tmp_path / "out")[name]) for name in untouched)


def one_line(capsys: pytest.CaptureFixture[str], command, *arguments: object) -> str:
    """What a command that refuses its input writes."""
    capsys.readouterr()
    assert command.main([str(argument) for argument in arguments]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told


def test_bad_checkpoints_are_one_line(tmp_path, capsys):
    hf_dir, out = written(tmp_path / "hf", "gpt2"), tmp_path / "out"
    adapters = {"rank": 3, "alpha": 6.0, "targets": TARGETS["gpt2"]}
    lora = write_run(tmp_path / "lora", hf_dir, adapted(hf_dir, TARGETS["gpt2"]), adapters=adapters)
    moved = shutil.move(hf_dir, tmp_path / "moved")
    assert f"{lora} holds what trained, and model.path the rest: {hf_dir} is not a directory" in one_line(
        capsys, export, lora, out
    )
    values = trained(Path(moved))
    whole = write_run(tmp_path / "whole", Path(moved), {**values, "transformer.wte.weight": torch.zeros(5, 48)})
    assert "parameter transformer.wte.weight has shape [5, 48]; it has shape [131, 48] in the model" in one_line(
        capsys, export, whole, out
    )
    strange = write_run(tmp_path / "strange", Path(moved), {**values, "more": torch.zeros(5)})
    assert "parameter more has shape [5]; it has no place in the model of hf/config.json" in one_line(
        capsys, verify, strange, moved
    )
    facts = json.loads((whole / "checkpoint.json").read_text())
    (whole / "checkpoint.json").write_text(json.dumps(facts | {"dtype": "float8"}))
    assert "checkpoint.json: dtype is 'float8'; must be torch.float32 or" in one_line(capsys, export, whole, out)
    (whole / "checkpoint.json").write_text(json.dumps(facts | {"adapters": {"rank": 3}}))
    assert "checkpoint.json: adapters is {'rank': 3}; must be null or" in one_line(capsys, export, whole, out)
    assert not out.exists()


def test_the_commands_find_the_newest_checkpoint_and_print_the_map(tmp_path, capsys):
    hf_dir = written(tmp_path / "hf", "olmoe")
    holder = tmp_path / "run" / "checkpoints"
    folder = write_run(holder / "step_00000003", hf_dir, trained(hf_dir))
    facts = asdict(replace(FACTS_OF_RUN, step=3)) | json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps(facts))
    (folder / "files.json").write_text(json.dumps(describe_files(folder)))
    (holder / "latest").write_text(json.dumps({"checkpoint": "step_00000003"}))
    assert export.main([str(tmp_path / "run"), "--dry-run"]) == 0
    table = capsys.readouterr().out
    assert "OlmoeForCausalLM" in table and "model.layers.0.mlp.experts.0.down_proj.weight" in table
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert verify.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert verify.main([str(holder / "latest"), str(hf_dir)]) == 0
