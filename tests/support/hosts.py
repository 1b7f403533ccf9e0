"""Machines for launchers that run on several: commands on the loopback, or network namespaces with a cable between."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from megalign.runtime.distributed import free_port
from tests.support.tiny_jobs import ROOT

TIMEOUT_S = 300.0  # ends only what hangs: far more than a job needs on a busy machine


@dataclass(frozen=True)
class Hosts:
    """Describes the machines: the words before a command that run it there, and what the commands need to meet."""

    prefixes: Sequence[Sequence[str]]
    address: str = "127.0.0.1"
    interface: str = "lo"

    def environment(self, port: int) -> dict[str, str]:
        """Return the variables that all machines of one job have."""
        return {
            "NNODES": str(len(self.prefixes)),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(port),
            "NET_INTERFACE": self.interface,
        }


LOOPBACK = Hosts(prefixes=[[], []])


@contextmanager
def namespaces() -> Iterator[Hosts]:
    """Yield two network namespaces that see each other alone; skip the test where they cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root rights and the program ip")
    names = [f"mg{uuid.uuid4().hex[:8]}{letter}" for letter in "ab"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names, 1):
            _ip("-n", name, "address", "add", f"10.99.0.{number}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", name, "link", "set", link, "up")
        yield Hosts([["ip", "netns", "exec", name] for name in names], address="10.99.0.1", interface="eth0")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        pytest.skip(f"no network namespaces here: ip {' '.join(words)}: {done.stderr.strip()}")


@dataclass
class Started:
    """Holds one command a machine, and the files with what they print."""

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def codes(self, timeout_s: float = TIMEOUT_S) -> list[int]:
        """Wait for all commands and return their exit codes."""
        until = time.monotonic() + timeout_s
        return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]

    def printed(self, number: int) -> str:
        """Return what a machine's command has printed."""
        return (self.folder / f"host{number}.txt").read_text(errors="replace")

    def lines(self, number: int) -> list[str]:
        """Return the lines of a machine's launcher and those of megalign's errors."""
        return [line for line in self.printed(number).splitlines() if line.startswith(("launch: ", "megalign: "))]

    def family(self, number: int) -> list[psutil.Process]:
        """Return all processes that run for a machine's command."""
        return psutil.Process(self.processes[number].pid).children(recursive=True)

    def rank(self, number: int) -> psutil.Process:
        """Return the process of a rank of the job."""
        family = [one for host in range(len(self.processes)) for one in self.family(host)]
        return next(one for one in family if one.environ().get("RANK") == str(number) and _is_rank(one))

    def agent(self, number: int) -> psutil.Process:
        """Return the process that starts a machine's ranks."""
        return next(one for one in self.family(number) if "megalign.runtime.torchrun" in one.cmdline())


def _is_rank(process: psutil.Process) -> bool:
    """Return whether a process is a rank itself and not one of its helpers."""
    parent = process.parent()
    return parent is not None and "RANK" not in parent.environ()


@contextmanager
def started(
    folder: Path, command: Sequence[str | Path], hosts: Hosts = LOOPBACK, **variables: str | Mapping[int, str]
) -> Iterator[Started]:
    """Run one command on every machine; a variable's value may differ by machine. Nothing is left running at the end.

    Every machine has its own NODE_RANK.
    """
    folder.mkdir(exist_ok=True)
    running, shared = Started(folder), hosts.environment(free_port())
    base = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **shared}
    try:
        for number, prefix in enumerate(hosts.prefixes):
            own = {name: value if isinstance(value, str) else value[number] for name, value in variables.items()}
            with (folder / f"host{number}.txt").open("wb") as out:
                process = subprocess.Popen(
                    [*prefix, *map(str, command)],
                    env={**base, "NODE_RANK": str(number), **own},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            running.processes.append(process)
        yield running
    finally:
        _kill(running)


def _kill(running: Started) -> None:
    """Kill what still runs for the commands."""
    for number, process in enumerate(running.processes):
        family = running.family(number) if process.poll() is None else []
        for one in [process, *family]:
            if one.is_running() if isinstance(one, psutil.Process) else True:
                one.kill()
        process.wait(30)


def until(condition: Callable[[], bool], running: Started, *, timeout_s: float = TIMEOUT_S) -> None:
    """Wait until a condition holds while all commands run."""
    end = time.monotonic() + timeout_s
    while not condition():
        for number, process in enumerate(running.processes):
            assert process.poll() is None, running.printed(number)
        assert time.monotonic() < end, [running.printed(number) for number in range(len(running.processes))]
        time.sleep(0.02)
