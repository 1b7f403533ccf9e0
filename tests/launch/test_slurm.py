"""launch/slurm.sbatch under a real Slurm of virtual nodes: bits, requeueing, arrays, bad input and lost nodes."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.slurm_cluster import Cluster, missing_programs, slurm_cluster
from tests.support.tiny_jobs import ROOT, metrics, numbers, records, status, write_config, write_lines, write_model

SCRIPT = ROOT / "launch/slurm.sbatch"
NUM_STEPS = 30
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--time=20")
# Steps take long while a file `hold` lies beside this module, so that a test can act in the middle of the run.
PACED = """
import time
from pathlib import Path
from megalign.losses import LossConfig, LossOut, Pairing, Traits, loss

class PacedConfig(LossConfig):
    def traits(self):
        return Traits(Pairing("single"))

@loss(PacedConfig)
def paced(scores, cfg):
    if Path(__file__).with_name("hold").exists():
        time.sleep(2.0)
    return LossOut(-scores.policy_S.sum() / scores.num_sequences)
"""


@dataclass
class Jobs:
    """Submits jobs from a folder whose name has a space."""

    folder: Path
    cluster: Cluster

    def submit(self, *options: str, run: str, script: str | Path = SCRIPT, more: str = "run.seed=0", **env: str) -> str:
        """Submit the script for a run directory; return the job's number."""
        arguments = [self.folder / "job.yaml", f"run.dir={self.folder}/{run}", more]
        variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.folder), **env}
        return self.cluster.sbatch(*options, script, *arguments, cwd=self.folder, **variables)

    def told(self, job: str) -> str:
        """Return what a job has written to the console."""
        path = self.folder / f"slurm-{job}.out"
        return path.read_text() if path.exists() else ""

    def ended(self, job: str, state: str, code: int, *, restarts: int = 0) -> str:
        """Wait for a job's end, compare how it ended, and return its console."""
        fields = self.cluster.end(job, timeout_s=400.0)
        told = self.told(job)
        assert (fields["JobState"], fields["ExitCode"].split(":")[0]) == (state, str(code)), f"{fields}\n{told}"
        assert fields["Restarts"] == str(restarts), told
        return told

    def await_steps(self, job: str, run: str, steps: int) -> None:
        """Wait until a run has taken so many steps."""
        path, until = self.folder / run / "metrics.jsonl", time.monotonic() + 240.0
        while not path.exists() or len(path.read_text().splitlines()) < steps:
            ended = "ended with" in self.told(job)
            assert not ended and time.monotonic() < until, f"no step {steps}:\n{self.told(job)}"
            time.sleep(0.2)

    def await_restart(self, job: str) -> None:
        """Wait until Slurm has put a job back into its queue."""
        self.cluster.await_job(job, lambda fields: fields["Restarts"] == "1", timeout_s=120.0)

    def result(self, run: str) -> tuple[list[dict[str, Any]], bytes]:
        """Return the numbers of all steps and the final weights."""
        return result_of(self.folder / run)


def result_of(run_dir: Path) -> tuple[list[dict[str, Any]], bytes]:
    assert status(run_dir) == {"code": 0, "reason": "done", "step": NUM_STEPS}
    return numbers(metrics(run_dir)), (run_dir / "hf/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("slurm") / "a folder"
    write_model(folder / "model")
    write_lines(folder / "data.jsonl", records("singles", 24))
    (folder / "paced_loss.py").write_text(PACED)
    changes: dict[str, Any] = {"run": {"steps": NUM_STEPS}, "data": {"groups_per_step": 8}}
    write_config(folder, **changes, loss={"name": "paced_loss:paced"}, export={"hf_dir": "{run.dir}/hf"})
    return folder


@pytest.fixture(scope="module")
def jobs(folder, tmp_path_factory) -> Iterator[Jobs]:
    if problem := missing_programs():
        pytest.skip(problem)
    with slurm_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield Jobs(folder, cluster)


@pytest.fixture
def hold(folder) -> Iterator[Path]:
    """Make steps slow until the test removes this file, or ends."""
    file = folder / "hold"
    file.touch()
    yield file
    file.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def reference(folder) -> tuple[list[dict[str, Any]], bytes]:
    """Train by launch/torchrun.sh on four ranks of this machine; the result that jobs must equal in every bit."""
    done = subprocess.run(
        ["bash", str(ROOT / "launch/torchrun.sh"), "4", str(folder / "job.yaml"), f"run.dir={folder}/reference"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return result_of(folder / "reference")


def dry_run(folder: Path, *arguments: str, **variables: str) -> list[list[str]]:
    """Return the words of each line that the script shows outside of Slurm."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "CONTAINER"))}
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env={**plain, "DRY_RUN": "1", **variables},
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_dry_run_shows_the_commands_and_starts_nothing(tmp_path):
    given = ["my job.yaml", "run.dir=a b/$c", "data.path=x;y"]
    variables, checks, train = dry_run(tmp_path, *given)
    logs = tmp_path / "logs/JOB"
    assert variables == ["export", "MASTER_ADDR=FIRST_NODE", "MASTER_PORT=PORT", f"MEGALIGN_RESULT_FILE={logs}/code-0"]
    assert checks[0] == train[0] == "srun" and checks[-3:] == train[-3:] == given
    assert "megalign.preflight" in checks and checks[checks.index("--ranks") + 1] == "RANKS"
    assert train[-5:-3] == ["megalign", "train"] and train[-6] == "-m"
    assert {"--kill-on-bad-exit=1", f"--output={logs}/rank-%t.log", "--ntasks-per-node=GPUS"} <= set(train)
    train = dry_run(tmp_path, *given, NPROC="4", USE_TORCHRUN="1")[2]
    assert train[-6:-3] == ["megalign", "launch", "4"] and {"--ntasks-per-node=1", "--ntasks=NODES"} <= set(train)
    assert not list(tmp_path.iterdir())


def test_dry_run_with_containers(tmp_path):
    mounts = f"{ROOT}:{ROOT},{tmp_path}:{tmp_path},{tmp_path}/logs/JOB:{tmp_path}/logs/JOB,/data:/data"
    for words in dry_run(tmp_path, "job.yaml", CONTAINER_IMAGE="nvcr.io#torch", CONTAINER_MOUNTS="/data:/data")[1:]:
        assert {"--container-image=nvcr.io#torch", f"--container-mounts={mounts}"} <= set(words)
        assert words[words.index("env") :][:4] == ["env", f"PYTHONPATH={words_path(words)}", "python3", "-m"]
    for words in dry_run(tmp_path, "job.yaml", APPTAINER_IMAGE="a b.sif", CONTAINER_MOUNTS="/data:/data")[1:]:
        inside = words[words.index("apptainer") :]
        assert inside[:8] == ["apptainer", "exec", "--nv", "--bind", mounts, "--pwd", str(tmp_path), "a b.sif"]


def words_path(words: list[str]) -> str:
    return words[words.index("env") + 1].removeprefix("PYTHONPATH=")


@pytest.mark.parametrize(("arguments", "line"), [([], "usage: "), (["job.yaml"], "this is no job: must be submitted")])
def test_the_script_alone_says_how_it_is_used(arguments, line, tmp_path):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "DRY_RUN"))}
    done = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60, env=plain)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"slurm: {line}") and done.stderr.count("\n") == 1


def test_bad_input_ends_at_once_and_is_not_requeued(jobs):
    script = os.path.relpath(SCRIPT, jobs.folder)
    wrong = jobs.submit(*TWO_BY_TWO, run="wrong", script=script, more="run.sed=1")
    array = jobs.submit("--nodes=1", "--ntasks=1", "--array=1-2", run="array")
    no_ranks = jobs.submit("--nodes=1", run="no ranks", NPROC="two")
    no_cpus = jobs.submit("--nodes=1", "--gpus-per-node=2", run="no cpus")
    told = jobs.ended(wrong, "FAILED", 2)
    assert sum(line.startswith("megalign: error: command line: run.sed is not") for line in told.splitlines()) == 1
    assert told.splitlines()[-1] == f"slurm: job {wrong}, attempt 0: ended with code 2"
    assert not (jobs.folder / f"logs/{wrong}/rank-0.log").exists()
    for task in (1, 2):
        told = jobs.ended(f"{array}_{task}", "FAILED", 2)
        assert told.startswith("slurm: run.dir is the same for all tasks of the array: must be ")
    assert jobs.ended(no_ranks, "FAILED", 2).startswith("slurm: NPROC is 'two': must be the number of ranks a node")
    assert jobs.ended(no_cpus, "FAILED", 2).startswith("slurm: the job has 1 CPUs a node: must be one or more a rank")


def test_time_limit_and_requeue_end_with_the_bits_of_torchrun(jobs, hold, reference):
    job = jobs.submit("--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=2", "--time=20", run="limit")
    jobs.await_steps(job, "limit", 2)
    jobs.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes_of(jobs, job) + 2}")
    jobs.await_restart(job)
    jobs.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    hold.unlink()
    told = jobs.ended(job, "COMPLETED", 0, restarts=1)
    assert f"slurm: job {job}, attempt 0: stopped after saving; requeued" in told
    assert "stopped by SIGUSR1 after step" in told and "resumed from" in told and "Slurm ends this job at " in told
    assert jobs.result("limit") == reference
    names = {path.name for path in (jobs.folder / f"logs/{job}").iterdir()}
    assert names == {"attempts", "code-0", "code-1", *(f"rank-{rank}.log" for rank in range(4))}


def minutes_of(jobs: Jobs, job: str) -> int:
    """Return for how many full minutes a job has run."""
    hours, minutes, _ = jobs.cluster.job(job)["RunTime"].split(":")
    return 60 * int(hours) + int(minutes)


@pytest.mark.slow
def test_a_lost_node_ends_in_a_requeue_on_others(jobs, hold, reference):
    job = jobs.submit(*TWO_BY_TWO, run="lost", more="checkpoint.every=2")
    jobs.await_steps(job, "lost", 5)
    jobs.cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    try:
        jobs.await_restart(job)
        hold.unlink()
        told = jobs.ended(job, "COMPLETED", 0, restarts=1)
    finally:
        jobs.cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert "4 ranks on n[1-2]" in told and "4 ranks on n[1,3]" in told and "resumed from" in told
    assert jobs.result("lost") == reference


@pytest.mark.slow
def test_tasks_of_an_array_on_one_node_do_not_meet(jobs, hold):
    options = ("--nodes=1", "--ntasks-per-node=2", "--nodelist=n1", "--array=3-4")
    array = jobs.submit(*options, run="sweep-%a", more="run.seed=%a")
    for task in (3, 4):
        jobs.await_steps(f"{array}_{task}", f"sweep-{task}", 1)  # while both run
    hold.unlink()
    for task in (3, 4):
        assert "2 ranks on n1" in jobs.ended(f"{array}_{task}", "COMPLETED", 0)
        run_dir = jobs.folder / f"sweep-{task}"
        assert status(run_dir)["code"] == 0 and f"seed: {task}\n" in (run_dir / "config.yaml").read_text()
    assert metrics(jobs.folder / "sweep-3") != metrics(jobs.folder / "sweep-4")


@pytest.mark.slow
def test_torchrun_on_every_node(jobs, hold, reference):
    job = jobs.submit(*TWO_BY_TWO, run="agents", USE_TORCHRUN="1")
    jobs.await_steps(job, "agents", 2)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", job)
    jobs.await_restart(job)
    hold.unlink()
    told = jobs.ended(job, "COMPLETED", 0, restarts=1)
    assert "stopped after saving; requeued" in told and "resumed from" in told
    assert jobs.result("agents") == reference
    assert (jobs.folder / f"logs/{job}/node-1.log").exists()


@pytest.mark.slow
def test_a_killed_rank_fails_the_job_for_good(jobs, hold):
    job = jobs.submit(*TWO_BY_TWO, run="killed", more="checkpoint.every=1")
    jobs.await_steps(job, "killed", 2)
    victim = next(process for process in ranks_of(job) if process.environ().get("SLURM_PROCID") == "3")
    victim.kill()
    fields = jobs.cluster.end(job, 120.0)
    assert fields["JobState"] == "FAILED" and fields["Restarts"] == "0", jobs.told(job)
    assert fields["ExitCode"] in ("1:0", "137:0") and "ended with code" in jobs.told(job)


@pytest.mark.slow
def test_stopping_without_progress_is_requeued_only_so_often(jobs, hold):
    job = jobs.submit(*TWO_BY_TWO, run="stalls", MAX_STALLS="1")
    until = time.monotonic() + 120.0
    while not ranks_of(job):
        assert time.monotonic() < until, jobs.told(job)
        time.sleep(0.1)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", job)
    told = jobs.ended(job, "FAILED", 1, restarts=1)
    assert "attempt 0: stopped by USR1 before the first step; requeued" in told
    assert "megalign: failed: the job has started 1 times and saved no checkpoint;" in told


@pytest.mark.slow
def test_a_cancelled_job_saves_and_is_not_requeued(jobs, hold):
    job = jobs.submit(*TWO_BY_TWO, run="cancelled")
    jobs.await_steps(job, "cancelled", 2)
    jobs.cluster.run("scancel", job)
    fields = jobs.cluster.end(job, 120.0)
    assert fields["JobState"] == "CANCELLED" and fields["Restarts"] == "0"
    saved = status(jobs.folder / "cancelled")
    assert saved["code"] == 75 and (jobs.folder / f"cancelled/checkpoints/step_{saved['step']:08d}").exists()
    time.sleep(15.0)  # a requeued job would be pending again
    assert jobs.cluster.job(job)["JobState"] == "CANCELLED"


def ranks_of(job: str) -> list[psutil.Process]:
    """Return the ranks of a job: processes that train."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[1:4] == ["-m", "megalign", "train"] and process.environ().get("SLURM_JOB_ID") == job:
            found.append(process)
    return found
