"""Checks the directories that a job writes: shared by all ranks, writable, fast enough, and with room for the job."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalign.config.job import JobConfig
from megalign.doctor import disk
from megalign.doctor.finding import Finding
from megalign.doctor.needed import FILES_A_RANK, OTHER_FILES, Written, gigabytes, model_of, written
from megalign.doctor.storage_findings import judge_place
from megalign.doctor.visit import Check, Visit
from megalign.files import write_whole
from megalign.train.run_dir import is_inside, nearest

SEEN_S = 6.0  # for a file that another rank has written; a network file system's caches are a few seconds old
WRITERS_A_HOST = 4
RESERVING = ("ext4", "xfs", "lustre", "gpfs")  # file systems that reserve space at once, and count it in quotas


def storage_checks() -> list[Check]:
    """Return the check of run.dir, of its checkpoints and of export.hf_dir."""
    return [Check("storage", _look, _judge)]


@dataclass(frozen=True, slots=True)
class Place:
    """Names a directory that a job writes, and how many of its last parts do not exist yet on rank 0."""

    field: str
    path: Path
    missing: int

    @property
    def base(self) -> Path:
        """Return the directory that should exist on every rank."""
        return self.path if not self.missing else self.path.parents[self.missing - 1]


def places(cfg: JobConfig) -> list[Place]:
    """Return the directories that the job writes; those on a disk that an earlier one names already are left out."""
    found: list[Place] = []
    for field, path in _directories(cfg).items():
        base = nearest(path)
        place = Place(field, path, len(path.parts) - len(base.parts))
        same = any(is_inside(base, other.base) and _device(base) == _device(other.base) for other in found)
        if not same:
            found.append(place)
    return found


def _directories(cfg: JobConfig) -> dict[str, Path]:
    """Return {field: directory} of all that the job writes."""
    run_dir = Path(cfg.run.dir).absolute()
    found = {"run.dir": run_dir, "checkpoints": run_dir / "checkpoints"}
    if cfg.export.hf_dir is not None:
        # Its own name may be taken by an earlier export, into which nothing must be written.
        found["export.hf_dir"] = Path(cfg.export.hf_dir).absolute().parent
    return found


def _device(path: Path) -> int:
    try:
        return path.stat().st_dev
    except OSError:
        return -1


def _look(visit: Visit) -> list[dict[str, Any]]:
    """Probe each place on all ranks together; return what this rank saw of each."""
    cfg = visit.cfg
    if cfg is None:
        return []
    mine = [[place.field, place.missing] for place in places(cfg)] if visit.world.is_main else []
    plan, directories = visit.share("the directories", mine)[0], _directories(cfg)
    return [_probe(visit, Place(field, directories[field], missing)) for field, missing in plan]


def _probe(visit: Visit, place: Place) -> dict[str, Any]:
    """Look at one place; every rank makes the same exchanges, whatever fails on it."""
    seen: dict[str, Any] = {"field": place.field, "path": str(place.path), "base": str(place.base)}
    folder: Path | None = None
    try:
        if visit.world.is_main:
            folder, seen["unwritable"] = _begun(place.base)
        name = visit.share(f"the probe in {place.field}", None if folder is None else folder.name)[0]
        if name is None:
            return seen
        own = place.base / name
        _exchange(visit, own, seen)
        _try_locks(visit, own, seen)
        if visit.world.is_main:
            seen["lacking"] = disk.lacking(own)
            seen["room"] = _room(visit, place, own)
        seen["kind"] = disk.file_system(place.base) if not seen["unseen"] else None
        if place.field != "export.hf_dir":
            _measure(visit, own, seen)
        visit.share(f"the end of the probe in {place.field}", None)
        return seen
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _begun(base: Path) -> tuple[Path | None, str]:
    """Make this doctor's directory with rank 0's file; return it, or why that failed."""
    folder = base / f"{disk.PREFIX}{secrets.token_hex(8)}"
    try:
        folder.mkdir()
        write_whole(folder / "0", folder.name)
        disk.sweep(base, folder)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        return None, error.strerror or str(error)
    return folder, ""


def _exchange(visit: Visit, folder: Path, seen: dict[str, Any]) -> None:
    """Write a file of this rank's beside rank 0's, each seen by the other."""
    rank, main = visit.world.rank, visit.world.is_main
    seen["unseen"] = "" if main else disk.awaited(folder / "0", folder.name, time.monotonic() + SEEN_S)
    if not main and not seen["unseen"]:
        seen["unwritable"] = _reason(lambda: write_whole(folder / str(rank), f"{folder.name} {rank}"))
    answers = visit.share("files of the ranks", [seen["unseen"], seen.get("unwritable", "")])
    if main:
        came = [other for other, (unseen, unwritable) in enumerate(answers) if other and not unseen and not unwritable]
        until = time.monotonic() + SEEN_S
        problems = {other: disk.awaited(folder / str(other), f"{folder.name} {other}", until) for other in came}
        seen["not back"] = {str(other): problem for other, problem in problems.items() if problem}


def _try_locks(visit: Visit, folder: Path, seen: dict[str, Any]) -> None:
    """Hold a lock on rank 0 and try for it on one rank of every other host: two jobs must not have it both."""
    handle = -1
    if visit.world.is_main:
        handle, seen["lock"] = disk.hold_lock(folder)
    visit.share("the lock", None)
    first = visit.hosts.index(visit.hosts[visit.world.rank]) == visit.world.rank
    if not visit.world.is_main and first and not seen["unseen"]:
        handle, seen["second lock"] = disk.hold_lock(folder)
    visit.share("the second lock", None)
    if handle >= 0:
        os.close(handle)


def _measure(visit: Visit, folder: Path, seen: dict[str, Any]) -> None:
    """Measure writing by rank 0 alone, then by some ranks of every host at once."""
    rank, hosts = visit.world.rank, visit.hosts
    usable = not seen["unseen"] and not seen.get("unwritable")
    if visit.world.is_main:
        seen["alone"], seen["slow"] = _speed(folder / "0.speed")
    visit.share("one rank's writing", None)
    ahead = sum(host == hosts[rank] for host in hosts[:rank])
    if visit.world.size > 1:
        seen["at once"] = _speed(folder / f"{rank}.speed")[0] if usable and ahead < WRITERS_A_HOST else None
        visit.share("all hosts' writing", None)


def _speed(path: Path) -> tuple[float | None, str]:
    try:
        return disk.write_speed(path), ""
    except OSError as error:
        return None, error.strerror or str(error)


def _room(visit: Visit, place: Place, folder: Path) -> dict[str, Any]:
    """Return what this place is asked to hold and what is free there."""
    cfg = visit.cfg
    assert cfg is not None
    free, files = disk.space(place.base)
    room: dict[str, Any] = {"free": free, "files": files}
    model = model_of(cfg)
    if model is None:
        return room
    needs = written(cfg, model)
    exported_here = place.field == "export.hf_dir" or _exports_to(cfg, place.base)
    num_bytes = needs.export if exported_here else 0
    # Checkpoints lie in a place of their own where they have another disk than the run directory.
    holds_checkpoints = place.field == "checkpoints" or (place.field == "run.dir" and _keeps_checkpoints(cfg))
    if holds_checkpoints:
        num_bytes += needs.num_checkpoints * needs.checkpoint
    room |= {"needed": num_bytes, "what": _what(needs, checkpoints=holds_checkpoints, export=exported_here)}
    room["checkpoint"] = needs.checkpoint if holds_checkpoints else 0
    room["needed files"] = needs.num_checkpoints * (FILES_A_RANK * visit.world.size + OTHER_FILES) + OTHER_FILES
    if 0 < 2 * num_bytes <= free and disk.file_system(place.base)[0] in RESERVING:
        room["quota"] = disk.reserve(folder / "reserved", num_bytes)
    return room


def _exports_to(cfg: JobConfig, base: Path) -> bool:
    """Tell whether the export goes to the disk of a directory."""
    return cfg.export.hf_dir is not None and _device(nearest(Path(cfg.export.hf_dir))) == _device(base)


def _keeps_checkpoints(cfg: JobConfig) -> bool:
    """Tell whether checkpoints are on the disk of the run directory."""
    run_dir = Path(cfg.run.dir)
    return _device(nearest(run_dir / "checkpoints")) == _device(nearest(run_dir))


def _what(needs: Written, *, checkpoints: bool, export: bool) -> str:
    parts = [needs.in_words] if checkpoints and needs.num_checkpoints else []
    parts += [f"an export of {gigabytes(needs.export)}"] if export else []
    return " and ".join(parts)


def _reason(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _judge(visit: Visit, answers: Sequence[list[dict[str, Any]]]) -> list[Finding]:
    if visit.cfg is None:
        return []
    findings: list[Finding] = []
    for index in range(len(answers[0])):
        findings += judge_place(visit, visit.cfg, [answer[index] for answer in answers])
    return findings
