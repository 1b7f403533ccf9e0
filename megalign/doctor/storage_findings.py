"""Judges what all ranks saw of a directory that a job writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from megalign.config.job import JobConfig
from megalign.doctor.finding import Finding, State, where
from megalign.doctor.needed import gigabytes, num_writers
from megalign.doctor.visit import Visit
from megalign.runtime.ranks import by_value

IN_MEMORY = ("tmpfs", "ramfs")
LONG_SAVE_S = 300.0  # a judgement, not a limit of anything: half the default time-out of a hang


def judge_place(visit: Visit, cfg: JobConfig, seen: Sequence[dict[str, Any]]) -> list[Finding]:
    """Return the findings about one directory; seen: what each rank saw of it."""
    main = seen[0]
    field, base = main["field"], main["base"]
    if main["unwritable"]:
        advice = "choose another directory, free some space, or have rights given"
        return [
            Finding(f"{field} writable", "fail", f"{base}: {main['unwritable']} ({where([0], visit.hosts)})", advice)
        ]
    findings = _shared(visit, field, seen)
    findings += _writable(visit, field, seen)
    findings += _file_system(visit, field, seen)
    findings += _speed(visit, cfg, field, seen)
    findings += _space(field, base, main["room"])
    return findings


def _shared(visit: Visit, field: str, seen: Sequence[dict[str, Any]]) -> list[Finding]:
    """Tell which ranks do not see rank 0's files, or write files that rank 0 does not see."""
    if visit.world.size == 1:
        return []
    check, findings = f"{field} shared", []
    advice = "mount one shared file system there on every machine, or choose a directory on one"
    for (base, problem), ranks in _grouped((one["base"], one["unseen"]) for one in seen):
        if problem:
            line = f"not shared: {where(ranks, visit.hosts)} does not see what rank 0 writes in {base}: {problem}"
            findings.append(Finding(check, "fail", line, advice))
    for rank, problem in seen[0]["not back"].items():
        line = f"not shared: rank 0 does not see what {where([int(rank)], visit.hosts)} writes: {problem}"
        findings.append(Finding(check, "fail", line, advice))
    return findings or [
        Finding(check, "ok", f"all {visit.world.size} ranks see each other's files in {seen[0]['base']}")
    ]


def _writable(visit: Visit, field: str, seen: Sequence[dict[str, Any]]) -> list[Finding]:
    advice = "give every rank's user the right to write there; mount it read-write everywhere"
    findings = [
        Finding(f"{field} writable", "fail", f"{base}: {problem} ({where(ranks, visit.hosts)})", advice)
        for (base, problem), ranks in _grouped((one["base"], one.get("unwritable", "")) for one in seen)
        if problem
    ]
    return findings or [Finding(f"{field} writable", "ok", seen[0]["base"])]


def _file_system(visit: Visit, field: str, seen: Sequence[dict[str, Any]]) -> list[Finding]:
    """Tell what the file system is, and what it lacks that saving needs."""
    main, check = seen[0], f"{field} file system"
    kind, device = main["kind"]
    lacking: dict[str, str] = main["lacking"]
    found = f"{kind} ({device})" if device not in ("", kind) else kind
    needed = {what: reason for what, reason in lacking.items() if what != "hard links"}
    needed |= {"locks": main["lock"]} if main["lock"] else {}
    if needed:
        listed = ", ".join(f"no {what}: {reason}" for what, reason in needed.items())
        advice = "choose another file system: checkpoints and exports are renamed when complete, under a lock"
        return [Finding(check, "fail", f"{found}: {listed}", advice)]
    found += ": rename, sync and locks work" + (", hard links do not (files are copied instead)" if lacking else "")
    both = [rank for rank, one in enumerate(seen) if one.get("second lock", "held") == ""]
    if both:
        advice = "never start two jobs with one run.dir or export.hf_dir; or mount it with locks between machines"
        return [Finding(check, "warn", f"{found}, but not between rank 0 and {where(both, visit.hosts)}", advice)]
    if kind in IN_MEMORY:
        return [Finding(check, "warn", f"{found}; it is memory", "its files are gone when the machine restarts")]
    if kind == "overlay":
        return [Finding(check, "warn", f"{found}; it is a container's own", "its files are gone with the container")]
    return [Finding(check, "ok", found)]


def _speed(visit: Visit, cfg: JobConfig, field: str, seen: Sequence[dict[str, Any]]) -> list[Finding]:
    """Tell how fast files are written, and how long a checkpoint takes."""
    main, check = seen[0], f"{field} speed"
    if "alone" not in main:
        return []
    if main["alone"] is None:
        return [Finding(check, "fail", f"{main['base']}: {main['slow']}", "free some space, or choose another disk")]
    at_once = [one["at once"] for one in seen if one.get("at once")]
    found = f"{gigabytes(main['alone'])}/s by one rank"
    found += f", {gigabytes(sum(at_once))}/s by {len(at_once)} at once" if at_once else ""
    size = main["room"].get("checkpoint")
    if not size:
        return [Finding(check, "ok", found)]
    seconds = size / main["alone"] / num_writers(cfg, visit.world.size)
    seconds = max(seconds, size / max([sum(at_once), main["alone"]]))
    found += f"; a checkpoint of {gigabytes(size)} takes about {seconds:.1f} s"
    if seconds > LONG_SAVE_S and not cfg.checkpoint.async_save:
        advice = "training waits so long for each: set checkpoint.async, save less often, or choose a faster disk"
        return [Finding(check, "warn", found, advice)]
    return [Finding(check, "ok", found)]


def _space(field: str, base: str, room: dict[str, Any]) -> list[Finding]:
    """Tell whether free space, files and quota suffice."""
    check, free = f"{field} space", room["free"]
    if "needed" not in room:
        return [Finding(check, "warn", f"{gigabytes(free)} free in {base}; without the model the need is not known")]
    needed, files = room["needed"], room["files"]
    if not needed:
        return []
    found = f"{gigabytes(needed)} for {room['what']}; {gigabytes(free)} are free in {base}"
    advice = "free some space, choose another disk, or lower checkpoint.keep"
    if files is not None and files < room["needed files"]:
        return [
            Finding(check, "fail", f"{files} files (inodes) are free in {base}, {room['needed files']} needed", advice)
        ]
    if free < needed:
        return [Finding(check, "fail", found, advice)]
    if room.get("quota"):
        return [Finding(check, "fail", f"{found}, but not to this user: {room['quota']}", advice)]
    state: State = "warn" if free < 2 * needed else "ok"
    return [Finding(check, state, found, advice if state == "warn" else "")]


def _grouped(values: Iterable[tuple[str, str]]) -> list[tuple[tuple[str, str], list[int]]]:
    return list(by_value(list(values)).items())
