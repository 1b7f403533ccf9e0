"""Training stops in time for the end of Slurm's allocation, and a job that is requeued in vain ends."""

from __future__ import annotations

import time

import pytest

from megalign import preflight
from megalign.runtime.exit_codes import DONE, FAILED
from megalign.schema import UserError
from megalign.train.attempts import why_give_up
from megalign.train.time_limit import TimeLimit
from tests.support.checkpoint_dirs import write_checkpoint
from tests.support.tiny_jobs import metrics, numbers, records, status, train, write_config, write_lines, write_model


@pytest.fixture
def config(tmp_path):
    write_model(tmp_path / "model")
    write_lines(tmp_path / "data.jsonl", records("samples"))
    return write_config(tmp_path)


def limit(left: float, *, step: float, save: float | None, began_with: float = 3600.0) -> TimeLimit:
    """Return a limit `left` seconds away whose longest step and save took so long."""
    found = TimeLimit(time.time() + began_with)
    found.begin()
    found.ends, found.longest_step_s = time.time() + left, step
    if save is not None:
        found.saved(save)
    return found


@pytest.mark.parametrize(
    ("left", "step", "save", "began_with", "stops"),
    [
        (3000, 30, 20, 3600, False),
        (111, 30, 20, 3600, False),  # 30 s for a step, 20 s for a save and the reserve of a minute are 110 s
        (109, 30, 20, 3600, True),
        (151, 30, None, 3600, False),  # 30 s, and a minute for a save that was not seen yet: 150 s
        (149, 30, None, 3600, True),
        (1500, 1200, 400, 86400, True),  # steps of twenty minutes: the next one could not be saved
        (13, 1, 1, 100, False),  # of 100 s, a tenth is the reserve: 1 + 1 + 10 s
        (11, 1, 1, 100, True),
        (-5, 1, 1, 3600, True),
    ],
)
def test_a_step_begins_only_if_it_can_be_saved(left, step, save, began_with, stops):
    why = limit(left, step=step, save=save, began_with=began_with).why_stop()
    assert why.startswith("Slurm ends this job in ") if stops else why == ""


def test_the_longest_of_all_steps_and_saves_counts():
    found = limit(1000, step=0, save=3)
    found.saved(2)
    found.looked -= 500.0
    assert found.why_stop() == "" and found.why_stop() == ""
    assert found.longest_step_s >= 500.0 and found.longest_save_s == 3
    found.ends = time.time() + 550
    assert found.why_stop() == "Slurm ends this job in 0:09:10 (a step took up to 0:08:20, a save 3.0 s)"


def test_no_limit_and_the_end_of_another_job_stop_nothing():
    for ends in (None, time.time() - 10):
        found = TimeLimit(ends)
        assert found.begin() == "" and found.why_stop() == ""


def test_the_log_says_when_slurm_ends_the_job():
    line = TimeLimit(time.time() + 7200.5).begin()
    assert line.startswith("Slurm ends this job at 20") and line.endswith(
        "in 2:00:00: training stops before, in time to save"
    )
    assert TimeLimit(time.time() + 30).begin().endswith("a step and a save must fit in, so give such jobs more time")


def test_a_job_stops_in_time_and_goes_on(config, tmp_path, monkeypatch):
    assert train(config, f"run.dir={tmp_path}/whole") == 0
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    # The reserve alone is more than what is left; the run takes a step all the same, and saves.
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100_000))
    monkeypatch.setattr("megalign.train.time_limit.RESERVE_S", 1e6)
    monkeypatch.setattr("megalign.train.time_limit.RESERVE_SHARE", 1.0)
    for step in (1, 2):
        assert train(config) == 75
        found = status(tmp_path / "run")
        assert found["step"] == step and found["reason"].startswith("Slurm ends this job in ")
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert train(config) == 0
    assert numbers(metrics(tmp_path / "run")) == numbers(metrics(tmp_path / "whole"))


def test_max_minutes_that_are_over_first_are_the_reason(config, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100_000))
    assert train(config, "run.max_minutes=1e-9") == 75
    assert status(tmp_path / "run")["reason"] == "run.max_minutes is over"


def start(folder, checkpoint: str | None, *, max_stalls: int = 2) -> str:
    """Note a start of a job that has saved this checkpoint last."""
    if checkpoint is not None and not (folder / "run/checkpoints" / checkpoint).exists():
        write_checkpoint(folder / "run", int(checkpoint[-8:]))
    return why_give_up(folder / "logs/attempts", folder / "run", max_stalls=max_stalls)


def test_a_job_gives_up_after_starts_without_a_new_checkpoint(tmp_path):
    assert [start(tmp_path, None), start(tmp_path, None)] == ["", ""]
    line = start(tmp_path, None)
    assert line.startswith("the job has started 2 times and saved no checkpoint; ") and "\n" not in line
    for checkpoint in ("step_00000004", "step_00000004", "step_00000006", "step_00000006"):
        assert start(tmp_path, checkpoint) == ""
    assert "saved no checkpoint after step_00000006; " in start(tmp_path, "step_00000006")
    # One that cannot be resumed from is no progress.
    (write_checkpoint(tmp_path / "run", 8) / "metadata.json").write_text("")
    assert "saved no checkpoint after step_00000006; " in start(tmp_path, "step_00000008")
    assert start(tmp_path, "step_00000006", max_stalls=0) == ""
    (tmp_path / "logs/attempts").unlink()
    assert start(tmp_path, "step_00000006") == ""


def test_starts_are_noted_only_in_a_file_that_can_be_written(tmp_path):
    with pytest.raises(UserError, match="must be a file that can be written"):
        why_give_up(tmp_path, tmp_path / "run", max_stalls=1)


def test_the_checks_note_each_start(config, tmp_path, capsys):
    noted = ["--ranks", "1", "--attempts", str(tmp_path / "attempts"), "--max-stalls", "1", str(config)]
    assert preflight.main(noted) == DONE
    capsys.readouterr()
    assert preflight.main(noted) == FAILED
    assert capsys.readouterr().err.startswith("megalign: failed: the job has started 1 times and saved no checkpoint; ")
    assert (tmp_path / "attempts").read_text() == "none\nnone\n"
