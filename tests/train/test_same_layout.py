"""On every layout a run that stops after each step, and goes on there, is bitwise the run that does not stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalign.convert.megatron.torch_dist import TorchDistReader
from tests.support.processes import on_two_ranks
from tests.support.tiny_jobs import (
    NOW,
    metrics,
    numbers,
    records,
    round_sections,
    write_config,
    write_lines,
    write_model,
)
from tests.train.test_layouts import LORA, write_experts

PP2, SP, ZERO = "parallel.pipeline=2", "parallel.sequence=true", "engine.name=deepspeed"
LAYOUTS = {
    "tp2+sp": ["parallel.tensor=2", SP],
    "pp2": [PP2],
    "vpp2": [PP2, "parallel.virtual_pipeline=2"],
    "cp2": ["parallel.context=2"],
    "dp2": [],
    "zero1": [ZERO, "engine.zero.stage=1"],
    "zero2": [ZERO, "engine.zero.stage=2"],
    "zero3": [ZERO, "engine.zero.stage=3"],
    "zero2 tp2": [ZERO, "engine.zero.stage=2", "parallel.tensor=2"],
}
EXPERTS = {"ep2": ["parallel.expert=2"], "tp2+sp+ep2": ["parallel.tensor=2", SP, "parallel.expert=2"]}
JOBS = {
    "dense": ("deep", LAYOUTS, {}),
    "experts": ("moe", {**EXPERTS, "pp2": [PP2]}, {}),
    "adapters on experts": ("moe", EXPERTS, {"lora": LORA}),
    "rounds": ("moe", {"dp2": [], "ep2": ["parallel.expert=2"]}, {"loss": {"name": "grpo", "beta": 0.1}}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("same_layout")
    write_model(folder / "deep", num_hidden_layers=4, tokenizer=True)
    write_experts(folder / "moe")
    write_lines(folder / "data.jsonl", records("samples"))
    return folder


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint, with the optimizer's."""
    checkpoint = max((run / "checkpoints").glob("step_*"))
    if (checkpoint / "zero").is_dir():
        files = [load_file(path) for path in sorted((checkpoint / "zero").glob("*.safetensors"))]
        return {name: tensor for file in files for name, tensor in file.items()}
    reader = TorchDistReader(checkpoint)
    return {key: reader.read(key).clone() for key in reader.specs}


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_stopping_after_every_step_changes_no_bit(name, folder, tmp_path):
    model, layouts, sections = JOBS[name]
    sections = {"model": {"path": str(folder / model)}, "optimizer": {"weight_decay": 0.1}, **sections}
    if name == "rounds":
        sections |= round_sections(tmp_path)
    else:
        sections |= {"data": {"path": str(folder / "data.jsonl")}, "run": {"steps": 4}}
    config = write_config(tmp_path, checkpoint={"every": 4}, **sections)
    launched = []
    for layout, overrides in layouts.items():
        command = ["train", str(config), *overrides]
        launched.append(([*command, f"run.dir={tmp_path}/{layout} whole"], 0))
        launched += [([*command, f"run.dir={tmp_path}/{layout}", NOW], code) for code in (75, 75, 75, 0)]
    on_two_ranks(tmp_path, launched)
    for layout in layouts:
        run, whole = tmp_path / layout, tmp_path / f"{layout} whole"
        assert numbers(metrics(run)) == numbers(metrics(whole)), layout
        found, right = tensors_of(run), tensors_of(whole)
        assert found.keys() == right.keys() and len(found) > 20
        assert [key for key, tensor in right.items() if not torch.equal(found[key], tensor)] == [], layout
