"""launch/environment.sh sets what is not set, leaves the user's values alone, and gives a reason for every variable."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.support.tiny_jobs import ROOT

FILE = ROOT / "launch/environment.sh"
NAMES = re.findall(r"^default (\w+) ", FILE.read_text(), re.MULTILINE)


def sourced(**given: str) -> dict[str, str]:
    """The variables that a command sees which a script starts after sourcing the file, and the names in the list."""
    script = f'set -euo pipefail; source {FILE}; echo "list=${{ENVIRONMENT_NAMES[*]}}"; env'
    command = ["bash", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env={"PATH": "/usr/bin:/bin", **given})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def test_defaults_are_exported():
    seen = sourced()
    assert set(seen["list"].split()) == set(NAMES) - {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}
    assert all(seen[name] for name in seen["list"].split())
    assert not {"default", "cores", "threads", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} & seen.keys()
    seen = sourced(NET_INTERFACE="eth1")
    assert seen["GLOO_SOCKET_IFNAME"] == "eth1" and seen["NCCL_SOCKET_IFNAME"] == "=eth1"


@pytest.mark.parametrize("value", ["7", "a value of two words", "$(exit 1)"])
def test_the_users_values_stay(value):
    seen = sourced(**dict.fromkeys(NAMES, value))
    assert {name: seen[name] for name in NAMES} == dict.fromkeys(NAMES, value)
    assert seen["list"].split() == NAMES


def test_an_empty_value_leaves_a_variable_unset():
    # torch refuses an empty number, so empty variables must not reach it
    seen = sourced(**dict.fromkeys(NAMES, ""), NET_INTERFACE="eth1")
    assert not set(NAMES) & seen.keys() and seen["list"] == ""


def test_the_old_name_of_the_allocators_settings_counts():
    assert sourced(PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:64")["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"
    assert "PYTORCH_ALLOC_CONF" not in sourced(PYTORCH_CUDA_ALLOC_CONF="")


def test_threads_are_the_cores_of_a_rank():
    cores = int(subprocess.run(["nproc"], capture_output=True, text=True, timeout=30, env={}).stdout)
    assert sourced()["OMP_NUM_THREADS"] == "1"
    assert sourced(RANKS_PER_NODE="1")["OMP_NUM_THREADS"] == str(cores)
    assert sourced(RANKS_PER_NODE=str(2 * cores))["OMP_NUM_THREADS"] == "1"
    assert sourced(RANKS_PER_NODE="1", SLURM_CPUS_PER_TASK="12")["OMP_NUM_THREADS"] == "12"


def test_every_variable_has_its_reason():
    lines = FILE.read_text().splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("default ") or line.startswith("default() "):
            continue
        above = [lines[at] for at in range(number)]
        while above and re.match(r"(cores|threads)=", above[-1]):
            above.pop()
        assert above[-1].startswith("# ") and len(above[-1]) > 20, f"{line} has no reason above it"
    assert len(NAMES) == len(set(NAMES)) > 8
