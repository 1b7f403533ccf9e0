"""Findings on devices and limits, from what ranks of machines that are not here would read."""

from __future__ import annotations

import pytest
import torch

from megalign.doctor.devices import judge_devices
from megalign.doctor.limits import cgroup_limit, judge_limits
from megalign.doctor.nvidia import ERRORS, PENDING, SLOWED, answer
from megalign.doctor.visit import Visit
from megalign.runtime.distributed import World
from megalign.runtime.versions import driver_of

HOSTS = ["a", "a", "b", "b"]
GB = 10**9


def visit_of(hosts: list[str], device: str) -> Visit:
    return Visit(World(0, len(hosts), torch.device(device)), None, hosts=hosts)


def gpu(rank: int, **changed):
    held = {"name": "NVIDIA H100", "identity": f"u{rank}", "capability": [9, 0], "free": 79 * GB, "total": 80 * GB}
    machine = {"cores": "0xf", "threads": 1, "memory_free": 100 * GB, "present": 2, "visible": 2, "health": {}}
    return {**machine, **held, **changed}


def cpu(**changed):
    return {**gpu(0), "name": "CPU", "identity": "", "present": 0, "visible": 0, **changed}


def told(answers, device="cuda"):
    return [(each.state, each.found) for each in judge_devices(visit_of(HOSTS, device), answers)]


def test_devices():
    assert told([gpu(rank) for rank in range(4)]) == [("ok", "NVIDIA H100 on each rank, at least 79.0 of 80.0 GB free")]
    shared = [gpu(0), gpu(1), gpu(2), gpu(2)]
    assert told(shared) == [("fail", "one device is shared by ranks 2-3 on b")]
    taken = [gpu(0), gpu(1), gpu(2, free=20 * GB, health={"processes": "77 (python)"}), gpu(3)]
    ((state, found),) = told(taken)
    assert state == "warn" and found == "memory is in use already: 20.0 of 80.0 GB free at the fullest; rank 2 on b"
    assert "77 (python)" in judge_devices(visit_of(HOSTS, "cuda"), taken)[0].advice
    mixed = [gpu(0), gpu(1), gpu(2, name="NVIDIA L4"), gpu(3, name="NVIDIA L4")]
    assert told(mixed)[0] == (
        "warn", "ranks have different devices: NVIDIA H100 (ranks 0-1 on a); NVIDIA L4 (ranks 2-3 on b)"
    )  # fmt: skip
    unseen = [cpu(present=8)] * 2 + [cpu()] * 2
    assert told(unseen, "cpu")[0] == ("fail", "8 NVIDIA devices, of which torch sees none, on ranks 0-1 on a")


def test_health_of_devices():
    # Lines as nvidia-smi writes them with --format=csv,noheader,nounits.
    text = "GPU-u0, 0\nGPU-u1, [N/A]\nGPU-u2, 3\n"
    assert [answer(text, f"GPU-u{rank}", (ERRORS,)) for rank in range(4)] == [
        {ERRORS: "0"}, {ERRORS: "[N/A]"}, {ERRORS: "3"}, {}
    ]  # fmt: skip
    answers = [gpu(rank, health=answer(text, f"GPU-u{rank}", (ERRORS,))) for rank in range(4)]
    answers[3]["health"] = {PENDING[1]: "Yes", **dict.fromkeys(SLOWED, "Not Active")}
    answers[0]["health"]["clocks_throttle_reasons.hw_thermal_slowdown"] = "Active"
    assert told(answers) == [
        ("fail", "memory errors that could not be corrected, 3 at most: rank 2 on b"),
        ("warn", "bad memory is still in use until the device is reset: rank 3 on b"),
        ("warn", "clocks are slowed to protect the device from heat: rank 0 on a"),
    ]


@pytest.mark.parametrize(
    ("cores", "threads", "found"),
    [
        (["0xf"] * 4, 2, []),  # four cores for the four threads of each host
        (["0x1", "0x2", "0x1", "0x2"], 1, []),  # bound to a core each
        (["0x1"] * 4, 1, ["2 ranks on a compute with 2 threads in all on 1 cores"] * 2),
    ],
)
def test_cores(cores, threads, found):
    answers = [cpu(cores=mask, threads=threads) for mask in cores]
    assert [text.replace(" on b ", " on a ") for state, text in told(answers, "cpu") if state == "warn"] == found


def test_driver():
    closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12"
    opened = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (dvs-builder@U16)"
    assert driver_of(closed) == "535.104.05" and driver_of(opened) == "550.54.15" and driver_of("none") == "unknown"


def test_limits_of_control_groups(tmp_path):
    own, root = tmp_path / "own", tmp_path / "root"
    files = {"memory.max": "max", "job/memory.max": "8000", "job/step/memory.max": "9000", "pids/x/pids.max": "70"}
    files |= {"memory/slurm/memory.limit_in_bytes": "9223372036854771712"}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    own.write_text("0::/job/step\n")
    assert cgroup_limit("memory", root=root, own=own) == 8000
    assert cgroup_limit("pids", root=root, own=own) == -1
    own.write_text("4:memory:/slurm/job\n3:pids:/x/y\n0::/\n")
    assert cgroup_limit("memory", root=root, own=own) == -1  # what version 1 writes for no limit
    assert cgroup_limit("pids", root=root, own=own) == 70
    assert cgroup_limit("pids", root=root, own=tmp_path / "none") == -1


def test_limits_on_devices_and_infiniband():
    fine = {"files": 65536, "locked": -1, "file_size": -1, "address_space": -1, "processes": -1, "tasks": -1}
    fine |= {"memory": 64 * GB, "shm": 8 * GB, "infiniband": True, "root": False}
    visit = visit_of(HOSTS, "cuda")
    (finding,) = judge_limits(visit, [fine] * 4)
    assert finding.found == "65536 open files, 8.0 GB of /dev/shm, at most 64.0 GB of memory"
    low = fine | {"shm": 64 << 20, "locked": 65536, "tasks": 100}
    found = [each.found for each in judge_limits(visit, [fine, fine, low, low]) if each.state == "fail"]
    assert found == [
        "processes and threads of the control group (pids.max): 100, of which this job may need 512; ranks 2-3 on b",
        "free bytes of /dev/shm: 67108864, of which this job may need 134217728; ranks 2-3 on b",
        "locked memory (ulimit -l): 65536 bytes; ranks 2-3 on b",
    ]
