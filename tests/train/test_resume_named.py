"""`checkpoint.resume: DIR` starts from there once: whenever the job is requeued, its own checkpoints win and stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megalign.convert.transfer import hf_to_megatron
from tests.support.tiny_jobs import (
    NOW,
    checkpoint_steps,
    metrics,
    numbers,
    records,
    train,
    write_config,
    write_lines,
    write_model,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of three steps with a checkpoint after each, and one of six."""
    folder = tmp_path_factory.mktemp("named")
    write_model(folder / "model")
    write_lines(folder / "data.jsonl", records("samples"))
    config = write_config(folder, checkpoint={"every": 1, "keep": 9})
    assert train(config) == 0
    assert train(config, f"run.dir={folder}/whole", "run.steps=6", "checkpoint.every=6") == 0
    return folder


def job_in(tmp_path: Path, folder: Path, *, keep: int) -> Path:
    return write_config(
        tmp_path,
        model={"path": str(folder / "model")},
        data={"path": str(folder / "data.jsonl")},
        run={"steps": 6},
        checkpoint={"every": 1, "keep": keep},
    )


def steps(run: Path) -> list[int]:
    return [line["step"] for line in metrics(run)]


def as_whole(run: Path, folder: Path, *, first: int = 1) -> bool:
    return numbers(metrics(run)) == numbers(metrics(folder / "whole"))[first - 1 :]


@pytest.mark.parametrize("keep", [1, 9])
def test_a_requeued_start_inside_the_runs_own_checkpoints(keep, folder, tmp_path):
    """Before the first save it starts there again; after it, it goes on, and the named one stays for a new start."""
    shutil.copytree(folder / "run", tmp_path / "run")
    run, config = tmp_path / "run", job_in(tmp_path, folder, keep=keep)
    named = f"checkpoint.resume={run}/checkpoints/step_00000001"
    assert train(config, named, "run.steps=1") == 0  # as if killed before its first save: no step is left to take
    assert checkpoint_steps(run) == [1] and checkpoint_steps(run / "earlier_1") == [2, 3]
    assert train(config, named, NOW) == 75
    assert checkpoint_steps(run) == [1, 2]
    for step in (3, 4):
        assert train(config, named, NOW) == 75
        assert checkpoint_steps(run) == ([1, step] if keep == 1 else [*range(1, step + 1)])
    assert not (run / "earlier_2").exists()
    assert train(config, named) == 0 and as_whole(run, folder)
    assert checkpoint_steps(run / "earlier_1") == [2, 3]


def test_the_newest_one_named_itself_is_a_start_too(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    run, config = tmp_path / "run", job_in(tmp_path, folder, keep=1)
    named = f"checkpoint.resume={run}/checkpoints/step_00000003"
    for step in (4, 5):
        assert train(config, named, NOW) == 75
        assert 3 in checkpoint_steps(run) and step in checkpoint_steps(run)
    assert train(config, named) == 0 and as_whole(run, folder) and not (run / "earlier_1").exists()


def test_a_named_run_that_goes_on_meanwhile(folder, tmp_path):
    """Its newest checkpoint counts until the own run has saved."""
    other, run = tmp_path / "other", tmp_path / "run"
    shutil.copytree(folder / "run", other)
    shutil.rmtree(other / "checkpoints" / "step_00000003")
    config, named = job_in(tmp_path, folder, keep=1), f"checkpoint.resume={other}"
    assert train(config, named, "run.steps=2") == 0 and not (run / "checkpoints").exists()  # killed before its save
    shutil.copytree(folder / "run" / "checkpoints" / "step_00000003", other / "checkpoints" / "step_00000003")
    assert train(config, named, NOW) == 75 and steps(run) == [4]
    assert train(folder / "job.yaml", f"run.dir={other}", "run.steps=6") == 0  # the other is done
    assert train(config, named, NOW) == 75 and steps(run) == [4, 5]
    shutil.rmtree(other)  # and gone
    assert train(config, named) == 0 and as_whole(run, folder, first=4)


def test_a_requeue_whose_newest_checkpoint_is_damaged(folder, tmp_path):
    """The own one before it counts; only where none is whole the job starts from the directory, and they are kept."""
    run, config, named = tmp_path / "run", job_in(tmp_path, folder, keep=9), f"checkpoint.resume={folder}/run"
    for _ in range(2):
        assert train(config, named, NOW) == 75
    assert checkpoint_steps(run) == [4, 5]
    (run / "checkpoints" / "step_00000005" / "metadata.json").write_text("")
    assert train(config, named, NOW) == 75
    assert steps(run) == [4, 5] and checkpoint_steps(run) == [4, 5]
    assert "this run has saved step_00000004 since it started from" in (run / "log.txt").read_text()
    for step in (4, 5):
        (run / "checkpoints" / f"step_0000000{step}" / "metadata.json").write_text("")
    assert train(config, named) == 0 and as_whole(run, folder, first=4)
    assert checkpoint_steps(run) == [4, 5, 6] and checkpoint_steps(run / "earlier_1") == [4, 5]
    assert (run / "log.txt").read_text().count("passed over: ") == 2


def test_a_start_from_weights_alone_is_a_new_run(folder, tmp_path):
    """A converted checkpoint gives weights and nothing else; a requeue goes on, and keeps what it was started from."""
    hf_to_megatron(str(folder / "model"), tmp_path / "converted")
    run, config, named = tmp_path / "run", job_in(tmp_path, folder, keep=1), f"checkpoint.resume={tmp_path}/converted"
    assert train(config, named, NOW) == 75 and steps(run) == [1]
    log = (run / "log.txt").read_text()
    assert f"initial weights from {tmp_path}/converted" in log and "resumed from" not in log
    assert train(config, named, NOW) == 75 and steps(run) == [1, 2]
    assert train(config, named) == 0 and as_whole(run, folder)


def test_a_start_from_weights_that_lie_in_the_runs_own_folder(folder, tmp_path):
    """Nothing of an earlier run is taken for the new one's, although the folder must stay."""
    shutil.copytree(folder / "run", tmp_path / "run")
    run, config = tmp_path / "run", job_in(tmp_path, folder, keep=1)
    hf_to_megatron(str(folder / "model"), run / "checkpoints" / "converted")
    named = f"checkpoint.resume={run}/checkpoints/converted"
    assert train(config, named, NOW) == 75
    assert checkpoint_steps(run) == [1] and checkpoint_steps(run / "earlier_1") == [1, 2, 3]
    assert train(config, named, NOW) == 75 and steps(run) == [1, 2]
    assert json.loads((run / "checkpoints" / "latest").read_text()) == {"checkpoint": "step_00000002"}


def test_fewer_and_more_steps(folder, tmp_path):
    """A run's length is the configuration's: it may end at once, or go on, with a line either way."""
    shutil.copytree(folder / "run", tmp_path / "run")
    run, config = tmp_path / "run", job_in(tmp_path, folder, keep=9)
    before = (run / "metrics.jsonl").read_bytes()
    assert train(config, "run.steps=2") == 0
    assert (run / "metrics.jsonl").read_bytes() == before and checkpoint_steps(run) == [1, 2, 3]
    assert "no steps are left: the checkpoint is after step 3 and run.steps makes 2" in (run / "log.txt").read_text()
    assert train(config) == 0 and as_whole(run, folder)


def test_the_runs_own_directory_whose_newest_checkpoint_is_damaged(folder, tmp_path):
    """It is moved aside with what is newer than the whole one, and a requeue goes on from what came since."""
    shutil.copytree(folder / "run", tmp_path / "run")
    run, config = tmp_path / "run", job_in(tmp_path, folder, keep=9)
    (run / "checkpoints" / "step_00000003" / "metadata.json").write_text("")
    named = f"checkpoint.resume={run}"
    assert train(config, named, NOW) == 75
    assert checkpoint_steps(run) == [1, 2, 3] and checkpoint_steps(run / "earlier_1") == [3]
    assert train(config, named, NOW) == 75 and checkpoint_steps(run) == [1, 2, 3, 4]
    assert train(config, named) == 0 and as_whole(run, folder)
    assert not (run / "earlier_2").exists()
