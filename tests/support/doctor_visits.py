"""Runs of the doctor whose ranks differ: in environment, host, limits or working directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalign.runtime.distributed import free_port
from tests.support.hosts import Hosts

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Rank:
    """Describes what is special about one rank: words before its command, variables, the directory it starts in."""

    before: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path = ROOT
    source: Path = ROOT  # that holds the package megalign


def on(hosts: Hosts, number: int, *, interface: str | None = None) -> Rank:
    """Return a rank on one of two machines, which have the names `left` and `right` there."""
    named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', ("left", "right")[number]]
    chosen = hosts.interface if interface is None else interface
    return Rank([*hosts.prefixes[number], *named], {"GLOO_SOCKET_IFNAME": chosen} if chosen else {})


@dataclass(frozen=True)
class Visit:
    """A run of the doctor: the exit code of each rank, rank 0's output, and everybody's errors."""

    codes: list[int]
    output: str
    errors: list[str]

    @property
    def report(self) -> dict[str, Any]:
        """Rank 0's JSON."""
        return json.loads(self.output)

    def found(self, check: str) -> list[tuple[str, str]]:
        """(state, line) of each finding of a check."""
        return [(each["state"], each["found"]) for each in self.report["findings"] if each["check"] == check]


def doctor(
    *arguments: str,
    ranks: Sequence[Rank] = (Rank(),),
    size: int | None = None,
    address: str = "127.0.0.1",
    timeout_s: float = 240.0,
) -> Visit:
    """Run `megalign doctor` on ranks that are told that there are `size` of them; `--json` is added."""
    meeting = {"WORLD_SIZE": str(size or len(ranks)), "MASTER_ADDR": address, "MASTER_PORT": str(free_port())}
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            for number, rank in enumerate(ranks):
                processes.append(_started(number, rank, meeting, arguments, folder))
            codes = [process.wait(timeout=timeout_s) for process in processes]
        finally:
            for process in processes:
                process.kill()
        errors = [(folder / f"{number}.err").read_text() for number in range(len(ranks))]
        return Visit(codes, (folder / "0.out").read_text(), errors)


def _started(
    number: int, rank: Rank, meeting: Mapping[str, str], arguments: Sequence[str], folder: Path
) -> subprocess.Popen[bytes]:
    own = {"RANK": str(number), "LOCAL_RANK": str(number), "OMP_NUM_THREADS": "1", **rank.environment}
    path = os.pathsep.join(filter(None, [own.get("PYTHONPATH"), str(rank.source)]))
    environment = {**os.environ, **meeting, **own, "PYTHONPATH": path}
    command = [*rank.before, sys.executable, "-P", "-m", "megalign", "doctor", *arguments, "--json"]
    with open(folder / f"{number}.out", "wb") as out, open(folder / f"{number}.err", "wb") as err:
        return subprocess.Popen(command, cwd=rank.folder, env=environment, stdout=out, stderr=err)
