"""Judges a job by its ranks' signs of life: which rank says nothing, or that no rank makes progress any more."""

from __future__ import annotations

import json
import linecache
import os
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from megalign.runtime.ranks import span

WAITING_CODE = ("torch", "megatron", "deepspeed")  # packages in whose functions a call of `wait` waits for ranks


@dataclass(frozen=True, slots=True)
class Sign:
    """Holds what a rank says of itself, once in an interval; `progress` grows as its work goes on."""

    tick: int
    progress: int
    phase: str
    step: int | None  # the last finished one
    waits: str  # the collective that it waits in, if any
    left: bool  # it has ended by itself
    host: str
    machine: str  # the same for processes that see each other
    pid: int
    born: float

    @classmethod
    def none(cls) -> Sign:
        """Return that of a rank which has given none yet."""
        return cls(0, 0, "its start", None, "", False, "an unknown host", "", 0, 0.0)

    def pack(self) -> str:
        """Return it as text for the job's store."""
        return json.dumps(asdict(self))

    @classmethod
    def unpack(cls, text: bytes) -> Sign:
        """Rebuild it from the text of `pack`."""
        return cls(**json.loads(text))


@dataclass(slots=True)
class Seen:
    """Holds a rank's last sign, and when (by this process's clock) it was new and when it showed progress."""

    sign: Sign
    heard: float
    moved: float

    def hear(self, sign: Sign, now: float) -> None:
        """Note a sign that was read now, new or not."""
        if sign.tick != self.sign.tick:
            self.heard = now
        if sign.progress != self.sign.progress or sign.phase != self.sign.phase:
            self.moved = now
        self.sign = sign


@dataclass(frozen=True, slots=True)
class Verdict:
    """Says that the job must end, because of which ranks, and why; `step` is the last finished one."""

    ranks: tuple[int, ...]
    reason: str
    step: int | None
    silent: bool  # the ranks do not answer, so that others must end them


def judge(
    seen: Mapping[int, Seen], size: int, *, now: float, timeout_s: float, here: str, stalls: bool = True
) -> Verdict | None:
    """Return why the job must end, or None.

    here: the machine of the judging process. stalls: `seen` has every rank, so that progress can be judged.

    A rank that gives no sign for `timeout_s` is stopped, gone, or something in it lets no other thread run. One that
    gives signs may wait for others as long as any of them makes progress.
    """
    present = {rank: each for rank, each in seen.items() if not each.sign.left}
    silent = [rank for rank, each in present.items() if now - each.heard > timeout_s]
    steps = [each.sign.step for each in seen.values() if each.sign.step is not None]
    step = max(steps, default=None)  # of a rank that is silent the last sign may be some steps old
    if silent:
        sign = seen[silent[0]].sign
        reason = f"{_named(silent, size)} gave no sign of life for {timeout_s:g} s (watchdog.timeout_s), the last in "
        reason += f"{_doing(sign)}: {state_of(sign, here)}{_rest(present, silent, size)}"
        return Verdict(tuple(silent), reason, step, silent=True)
    if not stalls or not present or any(now - each.moved <= timeout_s for each in seen.values()):
        return None
    if any(now - each.heard > timeout_s / 2 for each in present.values()):
        return None  # one that was stopped a little after the last progress: soon it is silent, which says more
    stuck = [rank for rank, each in present.items() if not each.sign.waits] or _fewest(present)
    reason = f"{_named(stuck, size)} made no progress for {timeout_s:g} s (watchdog.timeout_s) in "
    reason += f"{_doing(seen[stuck[0]].sign)}{_rest(present, stuck, size)}"
    return Verdict(tuple(stuck), reason, step, silent=False)


def _named(ranks: list[int], size: int) -> str:
    """Return ranks in words: the first of them leads a status's reason."""
    return f"{span(ranks)} of {size}"


def _rest(present: Mapping[int, Seen], named: list[int], size: int) -> str:
    """Return what the ranks beside those named do, in words."""
    others = [rank for rank in present if rank not in named]
    return f"; {_named(others, size)} in {_doing(present[others[0]].sign)}" if others else ""


def _doing(sign: Sign) -> str:
    return f"{sign.phase}, waiting in {sign.waits}" if sign.waits else sign.phase


def _fewest(present: Mapping[int, Seen]) -> list[int]:
    """Return the ranks that wait in a collective that the fewest others wait in."""
    by_place: dict[tuple[str, str], list[int]] = {}
    for rank, each in present.items():
        by_place.setdefault((each.sign.phase, each.sign.waits), []).append(rank)
    return min(by_place.values(), key=len)


def state_of(sign: Sign, here: str) -> str:
    """Return what the system says of a rank's process, as far as it can be seen from this machine."""
    where = f"process {sign.pid} on {sign.host}"
    if not here or sign.machine != here:
        return f"{where} is stopped, gone, cut off, or something in it holds Python's interpreter lock (GIL)"
    process = process_of(sign)
    with suppress(psutil.Error):
        status = None if process is None else process.status()
        if status is None or status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return f"{where} has ended without a word"
        if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
            return f"{where} is stopped (SIGSTOP, or a debugger)"
        if status == psutil.STATUS_DISK_SLEEP:
            return f"{where} waits for a disk or a device"
    return f"{where} runs, but something in it holds Python's interpreter lock (GIL)"


def has_ended(sign: Sign, here: str) -> bool:
    """Tell whether a rank's process can be seen from this machine to have ended."""
    if not here or sign.machine != here:
        return False
    process = process_of(sign)
    try:
        return process is None or process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return True


def process_of(sign: Sign) -> psutil.Process | None:
    """Return a rank's process on this machine; None if it has ended, also where its number was given to another."""
    try:
        process = psutil.Process(sign.pid)
        return process if abs(process.create_time() - sign.born) < 1.0 else None
    except psutil.Error:
        return None


def place_of() -> tuple[str, int, float]:
    """Return what names this process on its machine: the machine's boot and process namespace, pid, time of start."""
    with suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}", os.getpid(), psutil.Process().create_time()
    return "", os.getpid(), psutil.Process().create_time()


def waiting_in() -> str:
    """Return the collective that some thread of this process waits in, and of which function it is; else ""."""
    for frame in sys._current_frames().values():
        stack = [
            (Path(each.f_code.co_filename), each.f_code.co_name, line) for each, line in traceback.walk_stack(frame)
        ]
        calls = [name for path, name, _ in stack if path.name == "distributed_c10d.py"]
        path, name, line = stack[0]
        # A thread may be between lines: then its frame has no number.
        text = linecache.getline(str(path), line or 0)
        if not calls and ".wait(" in text and set(WAITING_CODE) & set(path.parts):
            calls = [name]
        if calls:
            call = next((name for name in calls if not name.startswith("_")), calls[0])
            ours = [name for path, name, _ in stack if "megalign" in path.parts and name.isidentifier()]
            return f"{call} of {ours[0]}" if ours else call
    return ""
