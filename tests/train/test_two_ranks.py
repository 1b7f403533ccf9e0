"""Jobs of two processes: the same numbers as one process gives, resumed at every step, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.compare import assert_close_metrics
from tests.support.processes import on_two_ranks
from tests.support.tiny_jobs import (
    NOW,
    ROOT,
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

LAYOUTS = {"tp2": "parallel.tensor=2", "dp2": "parallel.tensor=1"}
STEPWISE = [("gvpo", "tp2"), ("gvpo", "dp2"), ("rounds", "tp2")]
MISBEHAVIOUR = {"exit": "raised SystemExit: 0", "raise": "raised ValueError: no such", "hang": "did not return in 3"}
JOBS = {
    "gvpo": {"run": {"steps": 3}, "data": {"path": "data.jsonl"}},
    "rounds": {"run": {"steps": None}},
    "rounds_grpo": {"run": {"steps": None}, "loss": {"name": "grpo"}},
    "rounds_rloo": {"run": {"steps": None}, "loss": {"name": "rloo"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every job on one rank here, and on two ranks in one launch: whole, and some of them step by step."""
    folder = tmp_path_factory.mktemp("ranks")
    write_model(folder / "model", tokenizer=True)
    write_lines(folder / "data.jsonl", records("samples"))
    launched = []
    for name, changes in JOBS.items():
        job = folder / name
        job.mkdir()
        base = {"model": {"path": str(folder / "model")}, "run": {"dump_steps": [1, 3]}}
        rounds = round_sections(job) if name.startswith("rounds") else {"data": {"path": str(folder / "data.jsonl")}}
        rounds["run"] = {**base["run"], **changes["run"]}
        config = write_config(job, **{**base, **rounds, "loss": changes.get("loss", {"name": "gvpo"})})
        assert train(config, f"run.dir={job}/one") == 0
        for layout, override in LAYOUTS.items():
            launched.append((["train", str(config), override, f"run.dir={job}/{layout}"], 0))
            if (name, layout) in STEPWISE:
                num_steps = len(metrics(job / "one"))
                stepwise = ["train", str(config), override, f"run.dir={job}/{layout}_stepwise", NOW]
                launched += [(stepwise, 75)] * (num_steps - 1) + [(stepwise, 0)]
    signalled = write_lines(folder / "signalled.jsonl", [{"prompt": "1+1=", "bonus": 0, "signal": True}] * 4)
    job = folder / "rounds"
    to_stop = ["train", str(job / "job.yaml"), f"run.dir={job}/stopped", f"rollout.path={signalled}"]
    launched.append((to_stop, 75))
    launched.append((["rollout", *to_stop[1:], f"run.dir={job}/stopped_rollout"], 75))
    for does in MISBEHAVIOUR:
        # Rank 1 has the second prompt of a round.
        path = write_lines(folder / f"{does}.jsonl", [{"prompt": "1=", "does": does if n else None} for n in range(2)])
        wrong = [
            f"rollout.path={path}",
            "rollout.prompts_per_round=2",
            "rollout.reward=tests.support.tiny_jobs:misbehave",
        ]
        wrong += [f"run.dir={job}/{does}", "watchdog.timeout_s=6"]
        launched.append((["train", str(job / "job.yaml"), *wrong], 2))
        launched.append((["rollout", str(job / "job.yaml"), *wrong, f"run.dir={job}/{does}_rollout"], 2))
    (folder / "told").write_text(on_two_ranks(folder, launched))
    return folder


def test_the_round_in_progress_is_saved_once(folder):
    """By rank 0, for all ranks to go on from."""
    saved = folder / "rounds" / "stopped" / "checkpoints"
    assert [path.name for path in saved.glob("step_*/round.json")] == ["round.json"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", JOBS)
def test_two_ranks_give_the_numbers_of_one(name, layout, folder):
    one, two = (numbers(metrics(folder / name / run)) for run in ("one", layout))
    assert len(one) == len(two) == (3 if name == "gvpo" else 4)
    assert_close_metrics(two, one)
    for step in (1, 3):
        ours, theirs = (read_lines(folder / name / run / "steps" / f"step_{step}.jsonl") for run in ("one", layout))
        for mine, other in zip(ours, theirs, strict=True):
            assert mine["response_ids"] == other["response_ids"] and mine["role"] == other["role"]
            assert other["coefficient"] == pytest.approx(mine["coefficient"], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(("name", "layout"), STEPWISE)
def test_stopping_after_every_step_changes_no_bit(name, layout, folder):
    whole, stepwise = (numbers(metrics(folder / name / run)) for run in (layout, f"{layout}_stepwise"))
    assert whole == stepwise


def test_signal_to_another_rank_stops_all(folder):
    told = status(folder / "rounds" / "stopped")
    assert told == {"code": 75, "reason": "stopped by a signal to another rank", "step": 1}
    assert (folder / "rounds" / "stopped" / "checkpoints" / "step_00000001").is_dir()
    told = status(folder / "rounds" / "stopped_rollout")
    reason = "stopped by a signal to another rank before the last round, and nothing was written"
    assert told == {"code": 75, "reason": reason, "step": None}


@pytest.mark.parametrize("command", ["", "_rollout"])
@pytest.mark.parametrize("does", MISBEHAVIOUR)
def test_a_reward_that_fails_on_rank_1_is_told_once(does, command, folder):
    kept = status(folder / "rounds" / f"{does}{command}")
    assert kept["code"] == 2 and kept["reason"].startswith(
        f"{folder / does}.jsonl:2: reward 'tests.support.tiny_jobs:misbehave' "
    )
    assert MISBEHAVIOUR[does] in kept["reason"]
    told = [line for line in (folder / "told").read_text().splitlines() if f"{does}.jsonl" in line]
    assert told == [f"megalign: error: {kept['reason']}"] * 2  # by train and by rollout


def test_only_rank_0_tells(folder):
    lines = (folder / "told").read_text().splitlines()
    assert sum(line.endswith("done after step 4") for line in lines) == 3 * len(LAYOUTS) + 1  # rounds and stepwise
    assert sum(line.endswith("done after step 3") for line in lines) == 2 * len(LAYOUTS)


def launch(config: Path, *overrides: str) -> subprocess.Popen[str]:
    """A job of two ranks that goes on for hours, once its first checkpoint is there and a step follows."""
    job = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "megalign", "train", str(config), "run.steps=1000000", "checkpoint.every=100", *overrides],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    lines = config.parent / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (lines.is_file() and lines.read_text().count("\n") > 100):
        assert job.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    return job


def end(job: subprocess.Popen[str], number: int, *, within: float) -> str:
    """Signal rank 1 of the job; what was told until all of its processes are gone."""
    family = psutil.Process(job.pid).children(recursive=True)
    rank_1 = next(one for one in family if one.name().startswith("python") and one.environ().get("RANK") == "1")
    began = time.monotonic()
    try:
        rank_1.send_signal(number)
        _, told = job.communicate(timeout=within)
        assert job.returncode != 0 and time.monotonic() - began < within
        assert not psutil.wait_procs(family, timeout=5)[1]
        return told
    finally:
        for process in [*family, job]:
            if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
                process.kill()


def failures(told: str) -> list[str]:
    return [line for line in told.splitlines() if line.startswith("megalign: failed: ")]


@pytest.fixture
def endless(folder, tmp_path):
    return write_config(
        tmp_path,
        model={"path": str(folder / "model")},
        data={"path": str(folder / "data.jsonl")},
        loss={"name": "dpo"},
        parallel={"tensor": 2},
    )


def test_killed_rank_ends_the_job(endless, tmp_path):
    told = end(launch(endless, "loss.name=sft", f"data.path={_singles(tmp_path)}"), signal.SIGKILL, within=60)
    assert len(failures(told)) == 1, told
    line = failures(told)[0]
    assert line.startswith("megalign: failed: rank 1 of 2: process ") and "step " in line
    assert " has ended without a word; rank 0 of 2 waited for it in " in line
    kept = status(tmp_path / "run")
    assert kept["code"] == 1 and line == f"megalign: failed: {kept['reason']}" and kept["step"] >= 100
    assert kept["step"] in (len(metrics(tmp_path / "run")), len(metrics(tmp_path / "run")) - 1)


def _singles(folder: Path) -> Path:
    return write_lines(folder / "singles.jsonl", records("singles"))


@pytest.mark.slow
def test_rank_that_hangs_is_not_waited_for_for_ever(endless, tmp_path):
    """Ten seconds of waiting, and torchrun gives a stopped rank another half minute."""
    job = launch(endless, "watchdog.timeout_s=10", "loss.name=sft", f"data.path={_singles(tmp_path)}")
    line = failures(end(job, signal.SIGSTOP, within=150))[0]
    assert line.startswith("megalign: failed: rank 1 of 2 gave no sign of life for 10 s ") and "is stopped" in line
    assert status(tmp_path / "run")["code"] == 1
