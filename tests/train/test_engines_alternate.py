"""One job goes on in the other engine from an export, and on other numbers of ranks from a checkpoint."""

from __future__ import annotations

import pytest

from tests.support.processes import run_ranks
from tests.support.tiny_jobs import metrics, numbers, records, train, write_config, write_lines, write_model

ENGINES = {"megatron": [], "deepspeed": ["engine.name=deepspeed", "engine.zero.stage=3"]}


def on_ranks(count, job):
    """Run a command line of megalign on this many ranks."""
    run_ranks(_run, count, job)


def _run(job):
    from megalign.__main__ import main

    assert main(job) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    write_model(folder / "model")
    return folder


@pytest.mark.parametrize("first", ENGINES)
def test_an_export_of_one_engine_goes_on_in_the_other(folder, first):
    job = folder / first
    job.mkdir()
    data = {"path": str(write_lines(job / "data.jsonl", records("samples")))}
    config = write_config(job, model={"path": str(folder / "model")}, data=data)
    assert train(config, *ENGINES[first], f"run.dir={job}/first", f"export.hf_dir={job}/hf") == 0
    found = {}
    for name, engine in ENGINES.items():
        assert train(config, *engine, f"run.dir={job}/{name}", f"model.path={job}/hf") == 0
        found[name] = numbers(metrics(job / name))
    for line, other in zip(found["deepspeed"], found["megatron"], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("stages", [(2, 2, 2), (3, 3, 3), (1, 3, 2)])
def test_a_job_goes_on_at_2_then_4_then_1_ranks(folder, stages):
    job = folder / "-".join(map(str, stages))
    job.mkdir()
    data = {"path": str(write_lines(job / "data.jsonl", records("samples")))}
    config = write_config(job, model={"path": str(folder / "model")}, data=data)
    base = ["train", str(config), "engine.name=deepspeed"]
    for number, (ranks, stage) in enumerate(zip((2, 4, 1), stages, strict=True), start=1):
        on_ranks(ranks, [*base, f"engine.zero.stage={stage}", f"run.steps={number}", f"run.dir={job}/changing"])
    assert train(config, *ENGINES["deepspeed"], f"run.dir={job}/alone") == 0
    changing, alone = numbers(metrics(job / "changing")), numbers(metrics(job / "alone"))
    assert len(changing) == len(alone) == 3
    for line, other in zip(changing, alone, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
