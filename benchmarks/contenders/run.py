"""Starts a contender's ranks as fresh processes and reads what their clocks noted."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Contender:
    """Names a way to train; `command` gets the path of its output, the number of steps and `arguments`."""

    name: str
    python: str
    module: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """Holds one run's numbers; speeds are those of the steps after the first, CPU seconds those of all ranks."""

    speed: float  # tokens a second
    cpu: float  # CPU seconds by 1000 tokens
    step_cpu: float  # CPU seconds a step
    peak: float  # bytes of the largest rank
    first: float  # seconds from the start of the processes to the end of the first step
    whole_cpu: float  # CPU seconds from the start to the end of the last step


class Failed(Exception):
    """Says in one line why a contender has no numbers."""


def run(contender: Contender, *, processes: int, steps: int, timeout_s: float) -> Run:
    """Train once; raise Failed with the contender's own last line where it fails."""
    began = time.time()
    return _numbers(outputs_of(contender, processes=processes, steps=steps, timeout_s=timeout_s), began)


def outputs_of(contender: Contender, *, processes: int, steps: int, timeout_s: float) -> list[Any]:
    """Run a contender's ranks to their end; return what each wrote."""
    with tempfile.TemporaryDirectory() as name:
        folder, until, port = Path(name), time.time() + timeout_s, _free_port()
        outputs = [folder / f"{rank}.json" for rank in range(processes)]
        ranks = []
        for rank, output in enumerate(outputs):
            command = [contender.python, "-m", contender.module, str(output), str(steps), *contender.arguments]
            with open(folder / f"{rank}.log", "wb") as log:
                environment = os.environ | _environment(rank, processes, port) | {"SCRATCH": name}
                ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
        try:
            _wait(ranks, until)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if not all(output.is_file() for output in outputs):
            raise Failed(_last_line(folder, [process.returncode for process in ranks]))
        return [json.loads(output.read_text(encoding="utf-8")) for output in outputs]


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """Return what a launcher tells a rank."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {
        **{key: str(value) for key, value in told.items()},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _wait(ranks: Sequence[subprocess.Popen[bytes]], until: float) -> None:
    """Wait until all ranks have ended, or one has failed, or the time is over."""
    while time.time() < until:
        codes = [process.poll() for process in ranks]
        if None not in codes:
            return
        if any(codes):
            time.sleep(5.0)  # the others may have the better message
            return
        time.sleep(0.05)


def _last_line(folder: Path, codes: Sequence[int]) -> str:
    """Return the last line of the rank that failed first in order, else how it ended."""
    for rank, code in enumerate(codes):
        lines = (folder / f"{rank}.log").read_text(encoding="utf-8", errors="replace").split("\n")
        lines = [line.strip() for line in lines if line.strip()]
        if code != 0 and lines:
            return lines[-1]
    return f"no numbers; exit codes {', '.join(map(str, codes))}"


def _numbers(ranks: Sequence[dict[str, Any]], began: float) -> Run:
    ends = [rank["ends"] for rank in ranks]
    tokens = sum(step[2] for rank in ends for step in rank[1:])
    seconds = ends[0][-1][0] - ends[0][0][0]
    cpu = sum(rank[-1][1] - rank[0][1] for rank in ends)
    return Run(
        speed=tokens / seconds,
        cpu=cpu / tokens * 1000,
        step_cpu=cpu / (len(ends[0]) - 1),
        peak=max(float(rank["peak"]) for rank in ranks),
        first=ends[0][0][0] - began,
        whole_cpu=sum(rank[-1][1] for rank in ends),
    )
