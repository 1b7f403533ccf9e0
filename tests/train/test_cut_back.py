"""At a run's end every step stands once in metrics, dumps and trackers, however often it was killed or went back."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from megalign.train.cut_back import keep_metrics_up_to, later_dumps
from tests.support.tiny_jobs import metrics, numbers, records, train, write_config, write_lines, write_model

# Stands for Weights & Biases: a step is taken once, and one before the last that was taken is dropped in silence.
FAKE_WANDB = """
import json
from pathlib import Path

class Run:
    def __init__(self, path):
        self.path = path
        self.lines = json.loads(path.read_text()) if path.exists() else []

    @property
    def step(self):
        return self.lines[-1][0] + 1 if self.lines else 0

    def log(self, numbers, step):
        if step >= self.step:
            self.lines.append([step, numbers["loss"] if "loss" in numbers else None])
            self.path.write_text(json.dumps(self.lines))

    def finish(self):
        pass

def init(*, dir, name, id, resume):
    assert resume == "allow"
    folder = Path(__file__).parent / "runs"
    folder.mkdir(exist_ok=True)
    return Run(folder / f"{name} {id}.json")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut_back")
    write_model(folder / "model")
    write_lines(folder / "data.jsonl", records("samples"))
    config = write_config(folder, run={"steps": 5, "dump_steps": [2, 3, 4, 5]}, checkpoint={"every": 2, "keep": 9})
    assert train(config, f"run.dir={folder}/whole", "trackers=[tensorboard]") == 0
    return folder


def in_tensorboard(run: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def dumps(run: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (run / "steps").iterdir()}


def test_what_a_killed_run_wrote_after_its_last_save(folder, tmp_path):
    """All that is there of steps 3 and 4, among it half a line and one that a disk spoiled, comes anew."""
    run, whole = tmp_path / "run", folder / "whole"
    shutil.copytree(whole, run)
    for step in (4, 5):
        shutil.rmtree(run / "checkpoints" / f"step_0000000{step}", ignore_errors=True)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines[:2], "\x00\x00\n", *lines[1:4], lines[4][:9]]))
    changed = [f"run.dir={run}", "trackers=[tensorboard]", "run.dump_steps=[2, 3, 5]"]
    assert train(folder / "job.yaml", *changed) == 0
    assert numbers(metrics(run)) == numbers(metrics(whole))
    assert in_tensorboard(run) == [(line["step"], pytest.approx(line["loss"])) for line in metrics(whole)]
    kept = dumps(whole)
    kept.pop("step_4.jsonl")  # no longer asked for
    assert dumps(run) == kept
    log = (run / "log.txt").read_text()
    assert "metrics.jsonl: the lines of steps 3 to 4 are dropped; these steps are taken again" in log
    assert "steps: the files of steps 3 to 5 are dropped" in log


def test_a_run_that_goes_back_keeps_what_it_had_aside(folder, tmp_path):
    run, whole = tmp_path / "run", folder / "whole"
    shutil.copytree(whole, run)
    named = f"checkpoint.resume={run}/checkpoints/step_00000002"
    assert train(folder / "job.yaml", f"run.dir={run}", named, "trackers=[tensorboard]") == 0
    assert dumps(run) == dumps(whole) and numbers(metrics(run)) == numbers(metrics(whole))
    assert [step for step, _ in in_tensorboard(run)] == [1, 2, 3, 4, 5]
    assert sorted(dumps(run / "earlier_1")) == ["step_3.jsonl", "step_4.jsonl", "step_5.jsonl"]


def test_wandb_gets_each_step_once(folder, tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setitem(sys.modules, "wandb", None)  # which has it removed, or as it was, after the test
    del sys.modules["wandb"]

    def sent() -> list[list]:
        return [json.loads(path.read_text()) for path in sorted((tmp_path / "modules" / "runs").iterdir())]

    run = tmp_path / "run"
    job = [f"run.dir={run}", "trackers=[wandb]", "run.dump_steps=[]"]
    assert train(folder / "job.yaml", *job, "run.steps=3") == 0
    assert train(folder / "job.yaml", *job) == 0  # from step 2 on, or 3
    losses = [[line["step"], line["loss"]] for line in metrics(folder / "whole")]
    assert sent() == [losses]
    # Another try from step 2 on with another rate is another run there, with the steps before.
    back = [f"checkpoint.resume={run}/checkpoints/step_00000002", "optimizer.lr=2e-3"]
    assert train(folder / "job.yaml", *job, *back, "checkpoint.allow=[optimizer.lr]") == 0
    assert len(sent()) == 2 and losses in sent()
    (other,) = [lines for lines in sent() if lines != losses]
    assert other == [[line["step"], line["loss"]] for line in metrics(run)] and other[:2] == losses[:2]


def test_lines_stand_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "again": 1}\n[1]\n{"no": 1}\n{"step": 4}\n{"step": 3}\n')
    assert keep_metrics_up_to(tmp_path, 2) == [3, 4]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert keep_metrics_up_to(tmp_path / "none", 2) == []


def test_dumps_are_found_by_number(tmp_path):
    (tmp_path / "steps").mkdir()
    for name in ("step_2.jsonl", "step_10.jsonl", "step_9.jsonl", "notes.txt", "step_11.jsonl.bak"):
        (tmp_path / "steps" / name).write_text("")
    assert [path.name for path in later_dumps(tmp_path, 2)] == ["step_9.jsonl", "step_10.jsonl"]
    assert later_dumps(tmp_path / "none", 0) == []
