"""A run that stops and goes on takes the very steps of one that does not; what counts as a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.tiny_jobs import (
    NOW,
    checkpoint_steps,
    metrics,
    numbers,
    read_lines,
    records,
    round_sections,
    status,
    train,
    write_config,
    write_lines,
    write_model,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_model(folder / "model", tokenizer=True)
    write_lines(folder / "data.jsonl", records("samples"))
    return folder


SCHEDULE = {"name": "cosine", "warmup_steps": 2, "min_lr": 1e-4}
JOBS = {
    "gvpo": {"run": {"steps": 5}},
    "gvpo bf16": {"run": {"steps": 3, "dtype": "bf16"}},
    "grpo": {"run": {"steps": 3}, "loss": {"name": "grpo", "beta": 0.1}},
    "epa over epochs": {"run": {"steps": None, "epochs": 1.2}, "loss": {"name": "epa"}},
}


@pytest.mark.parametrize("name", JOBS)
def test_stopping_after_every_step_changes_no_bit(name, folder, tmp_path):
    changes = {**JOBS[name], "optimizer": {"schedule": SCHEDULE, "weight_decay": 0.1}}
    changes["model"] = {"path": str(folder / "model")}
    changes["data"] = {**changes.get("data", {}), "path": str(folder / "data.jsonl")}
    config = write_config(tmp_path, **changes)
    assert train(config, f"run.dir={tmp_path}/whole", "run.dump_steps=[3]") == 0
    whole = metrics(tmp_path / "whole")
    assert len(whole) == (5 if name == "gvpo" else 3)  # floor(1.2 x 8 records / 3 groups) = 3
    for step in range(1, len(whole)):
        assert train(config, NOW) == 75
        assert status(tmp_path / "run") == {"code": 75, "reason": "run.max_minutes is over", "step": step}
    assert train(config, NOW, "run.dump_steps=[3]") == 0  # after the last step nothing is left to stop
    assert status(tmp_path / "run") == {"code": 0, "reason": "done", "step": len(whole)}
    assert numbers(metrics(tmp_path / "run")) == numbers(whole)
    if len(whole) == 3:
        steps = [read_lines(tmp_path / run / "steps" / "step_3.jsonl") for run in ("run", "whole")]
        assert steps[0] == steps[1]


@pytest.mark.parametrize(("loss", "source"), [("gvpo", "round_start"), ("grpo", "initial")])
def test_resume_in_the_middle_of_a_round(loss, source, folder, tmp_path):
    sections = {"model": {"path": str(folder / "model")}, "reference": {"source": source}, **round_sections(tmp_path)}
    sections["loss"] = {"name": loss, **({"beta": 0.1} if loss == "grpo" else {})}
    config = write_config(tmp_path, **sections)
    assert train(config, f"run.dir={tmp_path}/whole") == 0
    codes = [train(config, NOW) for _ in range(4)]
    assert codes == [75, 75, 75, 0]
    assert numbers(metrics(tmp_path / "run")) == numbers(metrics(tmp_path / "whole"))


def stop_after(steps: int, run_dir: Path, number: int) -> threading.Thread:
    """Signal this process once that many steps are in its metrics."""

    def wait() -> None:
        path = run_dir / "metrics.jsonl"
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if path.is_file() and path.read_text().count("\n") >= steps:
                os.kill(os.getpid(), number)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_stops_after_saving(number, folder, tmp_path):
    config = write_config(
        tmp_path,
        model={"path": str(folder / "model")},
        data={"path": str(folder / "data.jsonl")},
        run={"steps": 30},
        export={"hf_dir": str(tmp_path / "out")},
    )
    handler = signal.getsignal(number)
    thread = stop_after(2, tmp_path / "run", number)
    assert train(config) == 75
    thread.join()
    assert signal.getsignal(number) is handler
    told = status(tmp_path / "run")
    assert told["code"] == 75 and told["reason"] == f"stopped by {number.name}" and 2 <= told["step"] < 30
    assert len(metrics(tmp_path / "run")) == told["step"] and checkpoint_steps(tmp_path / "run") == [told["step"]]
    assert not (tmp_path / "out").exists()
    if number == signal.SIGTERM:
        assert train(config) == 0
        assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 31))
        assert status(tmp_path / "run") == {"code": 0, "reason": "done", "step": 30} and (tmp_path / "out").is_dir()


@pytest.fixture(scope="module")
def trained(folder):
    """Seven steps with a checkpoint after each, of which 3, 6 and 7 are kept."""
    config = write_config(folder, run={"steps": 7}, checkpoint={"every": 1, "keep": 2, "keep_every": 3})
    (folder / "run" / "checkpoints" / ".step_00000002.partial").mkdir(parents=True)
    assert train(config, f"export.hf_dir={folder}/out") == 0
    return config


@pytest.fixture
def job(trained, folder, tmp_path):
    """A copy of that run's directory, and its configuration."""
    shutil.copytree(folder / "run", tmp_path / "run")
    return write_config(
        tmp_path,
        model={"path": str(folder / "model")},
        data={"path": str(folder / "data.jsonl")},
        run={"steps": 7},
        checkpoint={"every": 1, "keep": 2, "keep_every": 3},
    )


def test_newest_and_every_third_are_kept(trained, folder):
    assert checkpoint_steps(folder / "run") == [3, 6, 7]
    assert json.loads((folder / "run" / "checkpoints" / "latest").read_text()) == {"checkpoint": "step_00000007"}
    # What a killed save had left is gone.
    assert {path.name for path in (folder / "run" / "checkpoints").iterdir()} == {
        "latest", "step_00000003", "step_00000006", "step_00000007",
    }  # fmt: skip


def test_the_newest_whole_checkpoint_wins(job, tmp_path):
    """Whatever `latest` names: a save may have been killed before it; half a line of metrics does not count."""
    run = tmp_path / "run"
    whole = numbers(metrics(run))
    (run / "checkpoints" / "latest").write_text('{"checkpoint": "step_00000003"}')
    spoiled = next((run / "checkpoints" / "step_00000007").glob("*.distcp"))
    spoiled.write_bytes(spoiled.read_bytes()[:-1])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    assert train(job) == 0
    log = (run / "log.txt").read_text()
    assert f"passed over: {spoiled.parent}: {spoiled.name} is " in log
    assert "latest names step_00000003; the newest whole checkpoint is step_00000006" in log
    assert "step_00000006 after step 6" in log and "the lines of steps 7 to 7 are dropped" in log
    assert numbers(metrics(run)) == whole
    assert checkpoint_steps(run) == [3, 6, 7]
    assert json.loads((run / "checkpoints" / "latest").read_text()) == {"checkpoint": "step_00000007"}


@pytest.mark.parametrize("where", ["run", "run/checkpoints", "run/checkpoints/step_00000006"])
def test_named_checkpoint(where, job, tmp_path):
    assert (
        train(
            job,
            f"checkpoint.resume={tmp_path}/{where}",
            f"run.dir={tmp_path}/other",
            "run.steps=8",
            "checkpoint.every=0",
        )
        == 0
    )
    first = 7 if where.endswith("6") else 8
    assert [line["step"] for line in metrics(tmp_path / "other")] == list(range(first, 9))


def test_never_begins_anew_beside_old_checkpoints(job, tmp_path):
    """What the new run saves must not be taken for the oldest and dropped."""
    assert train(job, "checkpoint.resume=never", "run.steps=2") == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    assert json.loads((tmp_path / "run" / "checkpoints" / "latest").read_text()) == {"checkpoint": "step_00000002"}
    assert {1, 2} <= set(checkpoint_steps(tmp_path / "run"))
    assert train(job, "run.steps=3") == 0
    assert "step_00000002 after step 2" in (tmp_path / "run" / "log.txt").read_text()


def test_finished_run_only_exports_again(job, folder, tmp_path):
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train(job, f"export.hf_dir={tmp_path}/out") == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    first, again = (load_file(path / "out" / "model.safetensors") for path in (folder, tmp_path))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
