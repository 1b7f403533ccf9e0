"""Ranks and commands of the tests, as children of one server that has imported what takes every process seconds.

A child shares no state with the test's own process. Where there is a CUDA device, which cannot be used after a fork,
each child starts as a new process.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalign.runtime.distributed import free_port

IMPORTED_AHEAD = ["tests.support.imported_ahead"]
TIMEOUT_S = 1800.0  # ends only children that hang: far more than the longest needs on a busy machine


def start_method() -> str:
    """Return `forkserver`, after choosing what its server imports, or `spawn` where there is a CUDA device."""
    if torch.cuda.is_available():
        return "spawn"
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED_AHEAD)
    return "forkserver"


def run_ranks(function: Callable[..., None], num_processes: int, *args: object, timeout_s: float = TIMEOUT_S) -> None:
    """Run `function(*args)` in processes joined as a job, like `runtime.distributed.spawn`."""
    meeting = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = torch.multiprocessing.start_processes(
        _rank, ({**os.environ, **meeting}, function, args), num_processes, join=False, start_method=start_method()
    )
    until = time.monotonic() + timeout_s
    while not ranks.join(timeout=5.0):
        if time.monotonic() > until:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"the ranks did not end within {timeout_s:g} s")


def _rank(rank: int, environment: Mapping[str, str], function: Callable[..., None], args: tuple[object, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    function(*args)


def on_two_ranks(folder: Path, jobs: Sequence[tuple[list[str], int]]) -> str:
    """Run these (command line of megalign, exit code) on two ranks one after another; return their standard error.

    All jobs meet in one store, each under a number of its own, as torchrun's attempts do in its agent's store.
    """
    told = folder / "told_by_ranks"
    told.write_bytes(b"")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S))
    run_ranks(_run_jobs, 2, list(jobs), told, store.port)
    return told.read_text()


def _run_jobs(jobs: list[tuple[list[str], int]], told: Path, port: int) -> None:
    from megalign.__main__ import main

    _write_to(told, 2)
    warnings.simplefilter("ignore")
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", MASTER_PORT=str(port))
    for number, (arguments, code) in enumerate(jobs):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        found = main(arguments)
        if found != code:
            raise AssertionError(f"exit code {found} instead of {code}: {arguments}\n{told.read_text()}")


def run_python(
    folder: Path, *command: str | Path, environment: Mapping[str, str] | None = None, timeout_s: float = TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND`, a script's path or `-m` and a module first; its output goes to files in `folder`."""
    words = [str(word) for word in command]
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    context: Any = multiprocessing.get_context(start_method())
    process = context.Process(target=_run_command, args=(words, {**os.environ, **(environment or {})}, out, err))
    process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise subprocess.TimeoutExpired(words, timeout_s)
    return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def _run_command(words: list[str], environment: Mapping[str, str], out: Path, err: Path) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        path.write_bytes(b"")
        _write_to(path, descriptor)
    os.environ.clear()
    os.environ.update(environment)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _write_to(path: Path, descriptor: int) -> None:
    """Let a standard stream of this process, and what it starts, append to a file."""
    opened = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(opened, descriptor)
    os.close(opened)
