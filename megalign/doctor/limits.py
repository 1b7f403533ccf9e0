"""Checks the limits that the system sets on a rank's process: files, memory, processes, sizes."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalign.doctor.finding import Finding, where
from megalign.doctor.visit import Check, Visit
from megalign.runtime.ranks import by_value

UNLIMITED = -1
SHM = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Limits of control groups: the controller, and its files of versions 2 and 1.
CONTROLLERS = {"memory": ("memory.max", "memory.limit_in_bytes"), "pids": ("pids.max", "pids.max")}
# Checkpoint shards, logs and libraries; sockets to another rank in all groups. Twice what a rank of gloo jobs of 2, 4
# and 8 ranks was seen to hold (95, 107, 120).
FILES_OF_ALL, FILES_A_RANK = 256, 8
# Threads of torch, gloo or NCCL, tokenizers and a checkpoint's writers: 60 a rank were seen on CPUs, and devices add.
TASKS_A_RANK = 256
SHM_A_RANK = 64 << 20  # bytes; NCCL's buffers between processes of a machine


def limit_checks() -> list[Check]:
    """Return the check of limits."""
    return [Check("limits", lambda visit: _limits(), judge_limits)]


def _limits() -> dict[str, int | bool]:
    """Return this process's limits; -1 where there is none."""
    names = {
        "files": resource.RLIMIT_NOFILE,
        "locked": resource.RLIMIT_MEMLOCK,
        "file_size": resource.RLIMIT_FSIZE,
        "address_space": resource.RLIMIT_AS,
        "processes": resource.RLIMIT_NPROC,
    }
    held: dict[str, int | bool] = {name: resource.getrlimit(kind)[0] for name, kind in names.items()}
    held |= {"tasks": cgroup_limit("pids"), "memory": cgroup_limit("memory")}
    held["shm"] = shutil.disk_usage(SHM).free if SHM.is_dir() else 0
    held["infiniband"] = INFINIBAND.is_dir() and any(INFINIBAND.iterdir())
    held["root"] = os.geteuid() == 0  # whom the limit of processes does not bind
    return held


def cgroup_limit(controller: str, *, root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """Return the lowest limit of this process's control group and those around it; -1 where there is none."""
    new, old = CONTROLLERS[controller]
    limits = []
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        group = Path(path.lstrip("/"))
        # A container may see a path of the machine's here, and itself as the top.
        files = [top / folder / (old if controllers else new) for folder in (group, *group.parents)]
        limits += [int(text) for file in files if file.is_file() and (text := file.read_text().strip()) != "max"]
    return min((limit for limit in limits if limit < 1 << 60), default=UNLIMITED)


def judge_limits(visit: Visit, answers: Sequence[dict[str, Any]]) -> list[Finding]:
    """Return a finding for each limit that is too low somewhere, or one that names the lowest."""
    size, on_cuda = visit.world.size, visit.world.device.type == "cuda"
    most = max(len(ranks) for ranks in by_value(visit.hosts).values())  # ranks of a host
    files, tasks = FILES_OF_ALL + FILES_A_RANK * size, TASKS_A_RANK * most
    found = [
        *_below(visit, answers, "files", files, "open files (ulimit -n)", f"raise it to {max(files, 65536)} or more"),
        *_below(visit, answers, "tasks", tasks, "processes and threads of the control group (pids.max)", "raise it"),
        *_not_unlimited(visit, answers, "file_size", "size of a file (ulimit -f)", "checkpoints have files of many GB"),
        *_not_unlimited(visit, answers, "address_space", "address space (ulimit -v)", "CUDA and mapped files need TB"),
    ]
    if not all(held["root"] for held in answers):
        found += _below(visit, answers, "processes", tasks, "processes and threads (ulimit -u)", "raise it")
    if on_cuda:
        needed = SHM_A_RANK * most
        found += _below(
            visit, answers, "shm", needed, "free bytes of /dev/shm", "--shm-size or --ipc=host of a container"
        )
    if any(held["infiniband"] for held in answers):
        why = "InfiniBand registers memory that must be locked"
        found += _not_unlimited(visit, answers, "locked", "locked memory (ulimit -l)", why)
    if found:
        return found
    files, shm, memory = (_least(answers, name) for name in ("files", "shm", "memory"))
    limited = "memory not limited" if memory == UNLIMITED else f"at most {memory / 1e9:.1f} GB of memory"
    shown = f"{'any number of' if files == UNLIMITED else files} open files, {shm / 1e9:.1f} GB of /dev/shm, {limited}"
    return [Finding("limits", "ok", shown)]


def _least(answers: Sequence[dict[str, Any]], name: str) -> int:
    return min((held[name] for held in answers if held[name] >= 0), default=UNLIMITED)


def _below(
    visit: Visit, answers: Sequence[dict[str, Any]], name: str, needed: int, what: str, advice: str
) -> list[Finding]:
    ranks = [rank for rank, held in enumerate(answers) if 0 <= held[name] < needed]
    if not ranks:
        return []
    least = min(answers[rank][name] for rank in ranks)
    return [
        Finding(
            "limits",
            "fail",
            f"{what}: {least}, of which this job may need {needed}; {where(ranks, visit.hosts)}",
            advice,
        )
    ]


def _not_unlimited(visit: Visit, answers: Sequence[dict[str, Any]], name: str, what: str, why: str) -> list[Finding]:
    ranks = [rank for rank, held in enumerate(answers) if held[name] != UNLIMITED]
    if not ranks:
        return []
    found = f"{what}: {answers[ranks[0]][name]} bytes; {where(ranks, visit.hosts)}"
    return [Finding("limits", "fail", found, f"set it to unlimited: {why}")]
