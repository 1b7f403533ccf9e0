"""Kills random ranks of a job that restarts itself, and compares what it leaves with an undisturbed run."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from megalign.runtime.distributed import free_port
from tests.support.tiny_jobs import ROOT, metrics, numbers, records, status, write_config, write_lines, write_model

RANKS = 4
PHASES = ("loading", "scoring", "stepping", "saving", "exporting")  # in the order in which an attempt comes to them
PAUSE_S = {"loading": 1.0, "scoring": 0.6, "stepping": 0.3, "saving": 0.0, "exporting": 0.0}  # at most, before a kill
STEPS, EVERY = 24, 3
LIMIT_S = 400.0  # of an attempt: more is a hang


@dataclass
class Crashes:
    """Holds what was killed, in which phase, and how the job ended."""

    kills: list[str] = field(default_factory=list)
    code: int | None = None
    problems: list[str] = field(default_factory=list)


def write_job(folder: Path, **checkpoint: Any) -> Path:
    """Write model, data and configuration of a GVPO job on two tensor ranks by two stages."""
    folder.mkdir(exist_ok=True)
    write_model(folder / "model", num_hidden_layers=4, num_key_value_heads=4)
    write_lines(folder / "data.jsonl", records("samples", 48))
    return write_config(
        folder,
        run={"steps": STEPS},
        parallel={"tensor": 2, "pipeline": 2, "sequence": True},
        checkpoint={"every": EVERY, **checkpoint},
        export={"hf_dir": str(folder / "run/hf")},
        watchdog={"timeout_s": 60},
    )


def start(config: Path, run_dir: Path, *, restarts: int) -> subprocess.Popen[bytes]:
    """Start the job under launch/torchrun.sh; its output goes to a file beside the run directory."""
    words = ["bash", str(ROOT / "launch/torchrun.sh"), str(RANKS), str(config)]
    words += [f"run.dir={run_dir}", f"export.hf_dir={run_dir}/hf"]
    given = {"MAX_RESTARTS": str(restarts), "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    with open(run_dir.with_suffix(".txt"), "wb") as told:
        return subprocess.Popen(words, env={**os.environ, **given}, stdout=told, stderr=subprocess.STDOUT)


def ranks_of(launcher: psutil.Process, attempt: int) -> dict[int, psutil.Process]:
    """Return {rank: process} of an attempt's ranks that live."""
    processes: list[psutil.Process] = []
    with suppress(psutil.Error):
        processes = launcher.children(recursive=True)
    found = {_rank(process, attempt): process for process in processes}
    return {rank: process for rank, process in found.items() if rank is not None}


def _rank(process: psutil.Process, attempt: int) -> int | None:
    """Return the rank that a process is in an attempt; None where it is none."""
    with suppress(psutil.Error):
        given, words = process.environ(), process.cmdline()
        if given.get("TORCHELASTIC_RESTART_COUNT") == str(attempt) and "train" in words and "-m" in words:
            return int(given["RANK"])
    return None


def crash(config: Path, run_dir: Path, phases: Sequence[str], draw: random.Random) -> Crashes:
    """Run the job, killing a random rank in one phase of each attempt; the last attempt is left alone."""
    result = Crashes()
    job = start(config, run_dir, restarts=len(phases))
    launcher = psutil.Process(job.pid)
    try:
        for attempt, phase in enumerate(phases):
            began = _length(run_dir)
            ranks: dict[int, psutil.Process] = {}
            _until(lambda: len(ranks_of(launcher, attempt)) == RANKS, job)  # noqa: B023
            reached = _until(lambda: _reached(phase, run_dir, began), job)  # noqa: B023
            time.sleep(draw.uniform(0.0, PAUSE_S[phase]))
            ranks = ranks_of(launcher, attempt)
            if not reached or not ranks:
                result.problems.append(f"attempt {attempt} did not come to {phase}: code {job.poll()}")
                break
            victim = draw.choice(sorted(ranks))
            ranks[victim].kill()
            steps = len(metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0
            result.kills.append(f"{phase} (rank {victim}, {steps} steps in metrics.jsonl)")
        result.code = job.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        result.problems.append("the last attempt hangs")
    finally:
        for process in [*launcher.children(recursive=True), launcher] if job.poll() is None else []:
            with suppress(psutil.Error):
                process.kill()
    return result


def _length(run_dir: Path) -> int:
    log = run_dir / "log.txt"
    return log.stat().st_size if log.is_file() else 0


def _reached(phase: str, run_dir: Path, began: int) -> bool:
    """Tell whether the attempt whose log begins at a byte is in the phase."""
    log = run_dir / "log.txt"
    told = log.read_bytes()[began:].decode() if log.is_file() else ""
    if phase == "saving":
        return bool(list(run_dir.glob("checkpoints/.step_*.partial")))
    if phase == "exporting":  # a job tries before its first step whether it could
        lines = run_dir / "metrics.jsonl"
        trained = lines.is_file() and lines.read_bytes().count(b"\n") == STEPS
        return trained and bool(list(run_dir.glob(".hf.partial*")))
    return {"loading": "ranks 4: ", "scoring": "training data: ", "stepping": "step "}[phase] in told


def _until(reached: Callable[[], bool], job: subprocess.Popen[bytes]) -> bool:
    """Wait for something; False where the job ends or hangs before."""
    until = time.monotonic() + LIMIT_S
    while not reached():
        if job.poll() is not None or time.monotonic() > until:
            return False
        time.sleep(0.002)
    return True


def compare(run_dir: Path, undisturbed: Path) -> list[str]:
    """Return in what a run differs from the undisturbed one: code, metrics, each step once, weights, leftovers."""
    problems = []
    held = status(run_dir)
    if held != {"code": 0, "reason": "done", "step": STEPS}:
        problems.append(f"status.json: {held}")
    if [line["step"] for line in metrics(run_dir)] != list(range(1, STEPS + 1)):
        problems.append(f"metrics.jsonl: steps {[line['step'] for line in metrics(run_dir)]}")
    elif numbers(metrics(run_dir)) != numbers(metrics(undisturbed)):
        problems.append("metrics.jsonl: other numbers")
    for path in (undisturbed / "hf").glob("*.safetensors"):
        ours, theirs = load_file(run_dir / "hf" / path.name), load_file(path)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in theirs):
            problems.append(f"{path.name}: other weights")
    left = [path.name for path in [*run_dir.glob("checkpoints/.step_*"), *run_dir.glob(".hf.partial*")]]
    return [*problems, *([f"left behind: {left}"] if left else [])]
