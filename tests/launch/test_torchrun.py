"""launch/torchrun.sh exits with the job's own code, whatever a reward's module prints or does at exit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megalign import preflight
from megalign.runtime.status import RESULT_FILE
from tests.support.hosts import Hosts, Started, started, until
from tests.support.tiny_jobs import (
    ROOT,
    metrics,
    records,
    round_sections,
    status,
    write_config,
    write_lines,
    write_model,
)

SCORE = "def score(prompt, response, record): return float(len(response) % 3)\n"
SMALL = [sys.executable, "-m", "megalign.runtime.torchrun", "2", "-m", "tests.support.small_rank"]
ALONE = Hosts([[]])
NOISE = "import atexit, os\nprint('loaded')\nos.write(1, b'raw')\natexit.register(os.write, 1, b'bye')\n"


@pytest.fixture
def launch(tmp_path):
    """Launch a job of rounds whose reward's module begins with the given lines; what became of it."""
    write_model(tmp_path / "model", tokenizer=True)
    sections = round_sections(tmp_path, rounds=1, updates_per_round=1, reward="noisy:score")
    config = write_config(tmp_path, **{"model": {"path": str(tmp_path / "model")}, **sections})

    def launch(module: str, *overrides: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
        (tmp_path / "noisy.py").write_text(module + SCORE)
        return subprocess.run(
            ["bash", str(ROOT / "launch/torchrun.sh"), str(ranks), str(config), *overrides],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        )

    return launch


def test_noise_at_import_and_at_exit_leaves_the_code_alone(launch, tmp_path):
    done = launch(NOISE + "atexit.register(os._exit, 3)\n")
    assert done.returncode == 0, done.stderr
    assert status(tmp_path / "run") == {"code": 0, "reason": "done", "step": 1}
    assert not list(tmp_path.glob("megalign.*"))


@pytest.mark.parametrize(
    ("module", "overrides", "code", "line"),
    [
        (NOISE + "atexit.register(os._exit, 3)\n", ["rollout.k=1"], 2, "megalign: error: command line: rollout.k is 1"),
        (NOISE + "os.close(1)\n", ["run.sed=1"], 2, "megalign: error: command line: run.sed is not a known key"),
        ("import os\nos._exit(0)\n", [], 1, "launch: the checks ended early, by exit code 0"),
        ("import os\nos.kill(os.getpid(), 9)\n", [], 137, "launch: the checks ended early, by signal 9"),
    ],
    ids=["refused", "unknown key", "os._exit", "killed"],
)
def test_checks_that_do_not_pass(launch, module, overrides, code, line):
    done = launch(module, *overrides)
    assert done.returncode == code and done.stdout == "", done.stderr
    assert sum(told.startswith(line) for told in done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("arguments", [[], ["2"], ["two", "job.yaml"], ["0", "job.yaml"]])
def test_launcher_says_how_it_is_used(arguments):
    done = subprocess.run(["bash", str(ROOT / "launch/torchrun.sh"), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("usage: ") and done.stderr.count("\n") == 1


def asleep(running: Started) -> None:
    """Wait until both small ranks are in the middle of their work."""
    until(lambda: running.printed(0).count("sleeping: rank") == 2, running)


def test_a_restart_forgets_the_code_of_the_attempt_that_failed(tmp_path):
    result, deaths = tmp_path / "code", {"VICTIM": "1", "KILL_SIGNAL": "9", "DEATHS": "1", "MAX_RESTARTS": "1"}
    words = ["two words", "$HOME", "$$", "${local_rank}", "a=[1, 'b']"]
    with started(tmp_path / "out", [*SMALL, *words], ALONE, **deaths, **{RESULT_FILE: str(result)}) as running:
        assert running.codes() == [0] and not result.exists()
        assert running.lines(0) == ["launch: rank 1 was ended by SIGKILL; restart 1 of 1"]
        for rank in (0, 1):
            assert f"attempt 1, rank {rank} of 2, sum 4, {words}" in running.printed(0)


def test_restarts_have_an_end(tmp_path):
    result, deaths = tmp_path / "code", {"VICTIM": "1", "EXIT_CODE": "3", "DEATHS": "9", "MAX_RESTARTS": "1"}
    with started(tmp_path / "out", SMALL, ALONE, **deaths, **{RESULT_FILE: str(result)}) as running:
        assert running.codes() == [1] and result.read_text() == "1\n"
        assert running.lines(0) == ["launch: rank 1 ended with exit code 3; restart 1 of 1"]


def test_a_signal_before_the_first_step_ends_the_job_without_a_restart(tmp_path):
    result = tmp_path / "code"
    with started(
        tmp_path / "out", SMALL, ALONE, MAX_RESTARTS="3", SECONDS="60", **{RESULT_FILE: str(result)}
    ) as running:
        asleep(running)
        running.processes[0].send_signal(signal.SIGUSR1)
        assert running.codes() == [75] and result.read_text() == "75\n"
        assert running.lines(0) == ["launch: stopped by SIGUSR1 while the ranks were starting"]


def test_a_killed_launcher_leaves_no_ranks(tmp_path):
    with started(tmp_path / "out", SMALL, ALONE, SECONDS="60") as running:
        asleep(running)
        ranks = [running.rank(number) for number in (0, 1)]
        running.processes[0].kill()
        assert not psutil.wait_procs(ranks, timeout=5)[1]


def test_jobs_on_one_machine_do_not_meet(tmp_path):
    """Each host of the helper runs a job of its own here, all with the same settings of another launcher's."""
    with started(tmp_path / "out", SMALL, Hosts([[], [], []]), NNODES="1", NODE_RANK="0", SECONDS="1") as running:
        assert running.codes() == [0, 0, 0]
        for number in range(3):
            assert running.printed(number).count("of 2, sum 4") == 2 and running.lines(number) == []


@pytest.mark.parametrize("victim", ["agent", pytest.param("launcher", marks=pytest.mark.slow)])
def test_a_job_saves_when_its_launcher_is_killed(victim, tmp_path):
    write_model(tmp_path / "model")
    write_lines(tmp_path / "data.jsonl", records("samples"))
    config = write_config(tmp_path, run={"steps": 2000})
    lines = tmp_path / "run/metrics.jsonl"
    with started(tmp_path / "out", ["bash", ROOT / "launch/torchrun.sh", "2", config], ALONE) as running:
        until(lambda: lines.exists() and lines.read_text().count("\n") >= 2, running)
        ranks = [running.rank(number) for number in (0, 1)]
        launcher = psutil.Process(running.processes[0].pid)
        (running.agent(0) if victim == "agent" else launcher).kill()
        assert running.codes() == [75 if victim == "agent" else -9], running.printed(0)
        assert not psutil.wait_procs(ranks, timeout=60)[1]
    step = len(metrics(tmp_path / "run"))
    assert status(tmp_path / "run") == {"code": 75, "reason": "stopped by SIGTERM", "step": step}
    assert Path(tmp_path, f"run/checkpoints/step_{step:08d}").is_dir()


def test_options_that_are_not_known_are_one_line(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert preflight.main(["--ranks", "2", "job.yaml", "--lr", "1"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err == (
        "megalign: error: command line: unrecognized arguments: --lr 1; "
        "must be: python -m megalign launch N CONFIG.yaml [key.sub=value ...]\n"
    )
    assert not list(tmp_path.iterdir())
