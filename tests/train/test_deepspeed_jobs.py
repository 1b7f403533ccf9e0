"""Whole jobs of the DeepSpeed engine on two ranks, with the Megatron engine's numbers: rounds, references, teachers."""

from __future__ import annotations

import pytest

from tests.support.compare import assert_close_metrics
from tests.support.processes import on_two_ranks
from tests.support.tiny_jobs import (
    metrics,
    numbers,
    read_lines,
    records,
    round_sections,
    train,
    write_config,
    write_lines,
    write_model,
)

STAGES = (2, 3)
# Loss and reference of jobs of rounds, and of jobs of records.
ROUNDS = {
    "gvpo round_start": ({"name": "gvpo"}, "round_start"),
    "gvpo initial": ({"name": "gvpo"}, "initial"),
    "grpo initial": ({"name": "grpo", "beta": 0.1}, "initial"),
    "grpo round_start": ({"name": "grpo", "beta": 0.1}, "round_start"),
}
RECORDS = {"dpo": "pairs", "poft": "singles"}


def changes_of(name, folder, job):
    """The configuration of a job, as changes of `write_config`."""
    base = {"model": {"path": str(folder / "model")}, "run": {"dump_steps": [1, 3]}, "loss": {"name": name}}
    if name in ROUNDS:
        loss, source = ROUNDS[name]
        sections = round_sections(job, temperature=0.8)
        sections["run"] = {**sections["run"], **base["run"]}
        return {**base, **sections, "loss": loss, "reference": {"source": source}}
    path = write_lines(job / "data.jsonl", records(RECORDS[name]))
    base["data"] = {"path": str(path)}
    if name == "dpo":
        return {**base, "reference": {"source": str(folder / "other")}}
    teachers = [{"name": "near", "path": str(folder / "other")}, {"name": "small", "path": str(folder / "small")}]
    return {**base, "teachers": teachers}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every job on one rank of the Megatron engine, then on two of the DeepSpeed engine at each stage."""
    folder = tmp_path_factory.mktemp("zero")
    write_model(folder / "model", tokenizer=True)
    write_model(folder / "other", tokenizer=True, seed=1)
    write_model(folder / "small", tokenizer=True, seed=2, hidden_size=16)
    launched = []
    for name in (*ROUNDS, *RECORDS):
        job = folder / name
        job.mkdir()
        config = write_config(job, **changes_of(name, folder, job))
        assert train(config, f"run.dir={job}/megatron") == 0
        for stage in STAGES:
            ours = ["engine.name=deepspeed", f"engine.zero.stage={stage}", f"run.dir={job}/zero{stage}"]
            if stage == 3:  # small parameters are partitioned too
                zero = "engine.deepspeed_config.zero_optimization"
                ours.append(f"{zero}.stage3_param_persistence_threshold=0")
                ours.append("engine.recompute=full")
            launched.append((["train", str(config), *ours], 0))
    (folder / "told").write_text(on_two_ranks(folder, launched))
    return folder


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [*ROUNDS, *RECORDS])
def test_jobs_give_the_numbers_of_the_megatron_engine(folder, name, stage):
    right, found = (numbers(metrics(folder / name / run)) for run in ("megatron", f"zero{stage}"))
    assert len(right) == (4 if name in ROUNDS else 3)
    assert_close_metrics(found, right)
    assert [line["pass_mode"] for line in found] == [line["pass_mode"] for line in right] or name == "dpo"
    assert all(not line["pass_gap"] for line in found)
    for step in (1, 3):
        ours, theirs = (
            read_lines(folder / name / run / "steps" / f"step_{step}.jsonl") for run in (f"zero{stage}", "megatron")
        )
        for mine, other in zip(ours, theirs, strict=True):
            assert mine["response_ids"] == other["response_ids"] and mine["role"] == other["role"]
            assert mine["coefficient"] == pytest.approx(other["coefficient"], rel=1e-4, abs=1e-7)
            assert (mine.get("reference_logp") is None) == (name == "poft")
            if name != "poft":
                assert mine["reference_logp"] == pytest.approx(other["reference_logp"], rel=1e-5)


def test_only_rank_0_tells(folder):
    lines = (folder / "told").read_text().splitlines()
    assert sum("done after step" in line for line in lines) == len(STAGES) * (len(ROUNDS) + len(RECORDS))
    # What DeepSpeed and transformers log of themselves is kept out.
    assert not [line for line in lines if "deepspeed/" in line or "[INFO]" in line or "Warning" in line]
