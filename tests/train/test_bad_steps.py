"""A step whose loss or gradient is not finite moves nothing on any layout; the count lasts, and records are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalign.convert.megatron.torch_dist import TorchDistReader
from megalign.data.group import Response, TokenSequence
from megalign.engines.scoring import Scored
from megalign.engines.step import StepBatch, StepResult
from megalign.train.bad_steps import MOST, named, offenders
from tests.support.compare import assert_close_metrics
from tests.support.processes import on_two_ranks, run_python
from tests.support.tiny_jobs import (
    NOW,
    metrics,
    numbers,
    records,
    round_sections,
    status,
    train,
    write_config,
    write_lines,
    write_model,
)

DEEPSPEED = "engine.name=deepspeed"
LAYOUTS = {
    "tp2": ["parallel.tensor=2"],
    "pp2": ["parallel.pipeline=2"],
    "dp2": [],
    "zero1": [DEEPSPEED, "engine.zero.stage=1"],
    "zero2": [DEEPSPEED, "engine.zero.stage=2"],
    "zero3": [DEEPSPEED, "engine.zero.stage=3"],
}
GRADIENT, LOSS = 1e39, 1e200  # rewards: the squares of their gaps are beyond fp32, and beyond float64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose second step has a bad gradient and whose fourth a bad loss, on each layout; and one without them."""
    folder = tmp_path_factory.mktemp("bad_steps")
    write_model(folder / "model", tokenizer=True)
    good = records("samples")
    write_lines(folder / "good.jsonl", [good[0], good[1], good[4], good[5]])
    bad = json.loads(json.dumps(good))
    bad[3]["responses"][1]["reward"], bad[6]["responses"][0]["reward"] = GRADIENT, LOSS
    write_lines(folder / "data.jsonl", bad)
    config = job_in(folder)
    overrides = [f"run.dir={folder}/good", f"data.path={folder}/good.jsonl", "run.steps=3"]
    assert train(config, *overrides) == 0
    assert train(config, f"run.dir={folder}/one") == 0
    launched = [(["train", str(config), *ours, f"run.dir={folder}/{name}"], 0) for name, ours in LAYOUTS.items()]
    (folder / "told").write_text(on_two_ranks(folder, launched))
    return folder


def job_in(folder: Path, **changes) -> Path:
    sections = {
        "run": {"steps": 5, "max_bad_steps": 2},
        "data": {"groups_per_step": 2, "shuffle": False},
        "checkpoint": {"every": 1, "keep": 9},
    }
    return write_config(folder, **{**sections, **changes})


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    if (checkpoint / "zero").is_dir():
        files = [load_file(path) for path in sorted((checkpoint / "zero").glob("*.safetensors"))]
        return {name: tensor for file in files for name, tensor in file.items()}
    reader = TorchDistReader(checkpoint)
    return {key: reader.read(key).clone() for key in reader.specs}


@pytest.mark.parametrize("layout", ["one", *LAYOUTS])
def test_a_skipped_step_moves_nothing(layout, folder):
    steps = {n: tensors_of(folder / layout / "checkpoints" / f"step_{n:08d}") for n in range(1, 6)}
    assert len(steps[1]) > 20
    for before, after, same in ((1, 2, True), (2, 3, False), (3, 4, True), (4, 5, False)):
        assert steps[before].keys() == steps[after].keys()
        moved = [name for name, tensor in steps[before].items() if not torch.equal(tensor, steps[after][name])]
        assert not moved if same else len(moved) > 20, (before, moved)


@pytest.mark.parametrize("layout", ["one", *LAYOUTS])
def test_the_other_steps_are_those_of_a_run_without_it(layout, folder):
    """Same weights, moments and step count of the optimizer, so the same losses and gradients."""
    lines, right = numbers(metrics(folder / layout)), numbers(metrics(folder / "good"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["grad_norm"] is None for line in lines] == [False, True, False, True, False]
    assert [line["loss"] is None for line in lines] == [False, False, False, True, False]
    others = [{**lines[at], "step": step, "epoch": right[step - 1]["epoch"]} for step, at in ((1, 0), (2, 2), (3, 4))]
    assert_close_metrics(others, right)
    if layout == "one":
        assert others == right


@pytest.mark.parametrize("layout", ["one", *LAYOUTS])
def test_the_log_names_the_records(layout, folder):
    log = (folder / layout / "log.txt").read_text()
    assert "gradient norm" in log
    for step, line, count in ((2, 4, 1), (4, 7, 2)):
        (told,) = [text for text in log.splitlines() if f"step {step}: loss " in text and "skipped" in text]
        assert told.endswith(f" with {folder}/data.jsonl:{line}; skipped, {count} of run.max_bad_steps 2")


def test_the_count_survives_a_resume_and_ends_the_run(folder, tmp_path):
    config = job_in(tmp_path, model={"path": str(folder / "model")}, data={"path": str(folder / "data.jsonl")})
    job = [*("data.groups_per_step=2", "data.shuffle=false"), "optimizer.schedule.name=linear"]
    assert train(config, *job, f"run.dir={tmp_path}/whole") == 0
    assert [train(config, *job, NOW) for _ in range(5)] == [75, 75, 75, 75, 0]
    assert numbers(metrics(tmp_path / "run")) == numbers(metrics(tmp_path / "whole"))
    # The rate goes on falling to zero at the last step, skipped steps among them.
    assert [line["lr"] for line in metrics(tmp_path / "run")] == pytest.approx([8e-4, 6e-4, 4e-4, 2e-4, 0])
    once = [f"checkpoint.resume={tmp_path}/run/checkpoints/step_00000003", f"run.dir={tmp_path}/once"]
    ended = run_python(tmp_path, "-m", "megalign", "train", config, *job, *once, "run.max_bad_steps=1")
    told = status(tmp_path / "once")
    assert (told["code"], told["step"]) == (1, 3)
    assert f"loss inf, gradient norm None with {folder}/data.jsonl:7; bad steps 2, run.max" in told["reason"]
    assert ended.returncode == 1 and "run.max_bad_steps 1" in ended.stderr.splitlines()[-1]


def by_length(prompt: str, response: str, record: dict) -> float:
    """A reward whose gaps are as large as the record says."""
    return record["bonus"] * (len(response) + len(prompt))


def test_prompts_of_rounds_are_named(folder, tmp_path):
    sections = round_sections(tmp_path, reward="tests.train.test_bad_steps:by_length", updates_per_round=1, rounds=3)
    prompts = [{"prompt": f"{number}+1=", "bonus": 1e39 if number == 4 else 0.1} for number in range(7)]
    write_lines(tmp_path / "prompts.jsonl", prompts)
    config = write_config(tmp_path, model={"path": str(folder / "model")}, **sections)
    assert run_python(tmp_path, "-m", "megalign", "train", config).returncode == 1
    assert f" with {tmp_path}/prompts.jsonl:5; bad steps 1, run.max_bad_steps 0" in status(tmp_path / "run")["reason"]


def batch_of(rewards: list[float], reference: list[float] | None = None) -> StepBatch:
    answers = [Response((1, 2), reward) for reward in rewards]
    sequences = [TokenSequence(0, 0, "response", (3,), answer) for answer in answers]
    scored = None if reference is None else [Scored(total) for total in reference]
    return StepBatch(sequences, 1, scored)


def result_of(policy: list[float], coefficient: list[float]) -> StepResult:
    columns = (torch.tensor(column, dtype=torch.float64) for column in (policy, coefficient))
    return StepResult(0.0, {}, *columns, "two_pass", None, 0.0)


NAN = float("nan")


@pytest.mark.parametrize(
    ("rewards", "reference", "policy", "coefficient", "bad"),
    [
        ([1, 1, 1], [1, 1, 1], [1, NAN, 1], [NAN, NAN, NAN], [1]),  # a coupled batch shares the fault
        ([1, 1, 1], [1, 1, -float("inf")], [1, 1, 1], [NAN, NAN, NAN], [2]),
        ([1e39, 1, 1], None, [1, 1, 1], [1e39, 1e39, 1e39], [0]),
        ([1, 1, 1], None, [1, 1, 1], [1, 1e39, 1], [1]),
        ([1, 1, 1], None, [1, 1, 1], [1, 1, 1], [0, 1, 2]),  # somewhere inside the model
    ],
)
def test_whose_numbers_are_at_fault(rewards, reference, policy, coefficient, bad):
    assert offenders(batch_of(rewards, reference), result_of(policy, coefficient)) == bad


def test_many_records_are_counted():
    assert named(["a:1", "a:2", "a:1"]) == "a:1, a:2"
    assert named([f"a:{number}" for number in range(MOST + 2)]).endswith("a:5 and 2 more")
