"""A run whose layout changes at every step takes the steps of one that runs on one rank throughout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import on_two_ranks, run_ranks
from tests.support.tiny_jobs import (
    NOW,
    checkpoint_steps,
    metrics,
    records,
    train,
    write_config,
    write_lines,
    write_model,
)
from tests.train.test_layouts import write_experts

TP2, SP = "parallel.tensor=2", "parallel.sequence=true"
PP2, VPP2 = "parallel.pipeline=2", "parallel.virtual_pipeline=2"
CP2, EP2 = "parallel.context=2", "parallel.expert=2"
ZERO = "engine.name=deepspeed"
LORA = {"lora": {"rank": 3, "alpha": 6.0}, "optimizer": {"lr": 1e-2}}
# Every change is from the one before; the first is from one rank. No two neighbours are alike.
EXPERTS = [[EP2], [TP2, SP], [PP2], [CP2], [PP2, VPP2], [], [TP2, SP, EP2], [EP2], [CP2]]
DENSE = [[TP2], [PP2], [], [CP2], [PP2, VPP2], [TP2, SP], [CP2], [PP2, VPP2], [TP2]]
STAGES = [[f"engine.zero.stage={stage}", *more] for stage, *more in ((1,), (3,), (2, TP2), (3, CP2), (1, TP2), (2,))]
ON_FOUR = [[TP2, SP, PP2], [PP2, VPP2, CP2], [CP2, TP2, SP], [PP2], [TP2, SP], [CP2], [PP2, VPP2, TP2, SP], []]
EXPERTS_ON_FOUR = [[EP2, PP2], [TP2, SP, EP2, PP2], ["parallel.expert=4"], [CP2, EP2], [TP2, SP, EP2], [PP2, VPP2]]
SLOW = {  # model, ranks, sections, layouts
    "dense": ("deep", 2, {}, DENSE),
    "dense with adapters": ("deep", 2, LORA, DENSE),
    "experts": ("moe", 2, {"model": {"aux_loss_coefficient": 0.01}}, EXPERTS),
    "dense on four": ("deep", 4, {}, ON_FOUR),
    "adapters on four": ("deep", 4, LORA, ON_FOUR),
    "experts on four": ("moe", 4, {}, EXPERTS_ON_FOUR),
    "experts with adapters on four": ("moe", 4, LORA, EXPERTS_ON_FOUR),
    "ZeRO": ("deep", 2, {"engine": {"name": "deepspeed"}}, STAGES),
    "ZeRO with adapters": ("deep", 2, {"engine": {"name": "deepspeed"}, **LORA}, STAGES),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resharded")
    write_model(folder / "deep", num_hidden_layers=4)
    write_experts(folder / "moe")
    write_lines(folder / "data.jsonl", records("samples"))
    return folder


def begun(tmp_path: Path, folder: Path, model: str, num_steps: int, sections: dict) -> Path:
    """The configuration of a job that one rank has run as a whole, and of which it has taken a first step."""
    sections = {**sections, "model": {"path": str(folder / model), **sections.get("model", {})}}
    sections["data"] = {"path": str(folder / "data.jsonl")}
    config = write_config(tmp_path, run={"steps": num_steps}, **sections)
    assert train(config, f"run.dir={tmp_path}/whole") == 0
    assert train(config, NOW) == 75
    return config


def jobs_of(config: Path, layouts: list[list[str]]) -> list[tuple[list[str], int]]:
    """A step in each layout, each from the checkpoint of the one before."""
    last = len(layouts) - 1
    command = ["train", str(config), NOW]
    return [([*command, *layout], 0 if at == last else 75) for at, layout in enumerate(layouts)]


def assert_one_run(tmp_path: Path, num_steps: int) -> None:
    lines, whole = metrics(tmp_path / "run"), metrics(tmp_path / "whole")
    assert [line["step"] for line in lines] == [*range(1, num_steps + 1)]
    assert checkpoint_steps(tmp_path / "run")[-1] == num_steps
    for line, right in zip(lines, whole, strict=True):
        close = pytest.approx(right["loss"], rel=1e-6, abs=1e-6)
        assert line["loss"] == close, f"step {right['step']}"
        # Of the differences in a group, whose layouts round apart without any resume, too.
        assert line["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-5), f"step {right['step']}"


def test_nine_changes_of_layout_in_one_run(folder, tmp_path):
    """Adapters on experts and attention under Adam, whose moments and step count show in every later step."""
    num_steps = len(EXPERTS) + 1
    config = begun(tmp_path, folder, "moe", num_steps, LORA)
    on_two_ranks(tmp_path, jobs_of(config, EXPERTS))
    assert_one_run(tmp_path, num_steps)


def _on_ranks(jobs: list[tuple[list[str], int]]) -> None:
    from megalign.__main__ import main

    assert [main(arguments) for arguments, _ in jobs] == [code for _, code in jobs]


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_changes_of_layout(name, folder, tmp_path):
    model, num_ranks, sections, layouts = SLOW[name]
    num_steps = len(layouts) + 1
    config = begun(tmp_path, folder, model, num_steps, sections)
    jobs = jobs_of(config, layouts)
    if num_ranks == 2:
        on_two_ranks(tmp_path, jobs)
    else:
        for job in jobs:
            run_ranks(_on_ranks, num_ranks, [job])
    assert_one_run(tmp_path, num_steps)
