"""Counts a rank's progress and names what the rank is doing, for a watchdog that looks from another thread."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

# What is progress in a phase besides beats: bytes that the process and its helpers read and write, and with "work"
# also processor time. A rank that waits for another may use processor time too, so "work" is for phases without waits.
Counts = Literal["beats", "bytes", "work"]
MIB = 2**20


class Heart:
    """Holds the phase of this rank and a count that grows as the rank makes progress."""

    def __init__(self) -> None:
        self.phase = "starting"
        self.step: int | None = None
        self.beats = 0
        self._counts: Counts = "beats"
        self._activity = Activity()
        self._done = self._active = 0

    def beat(self) -> None:
        """Count a piece of work, such as a micro-batch; cheap enough for every token."""
        self.beats += 1

    @contextmanager
    def during(self, phase: str, step: int | None = None, *, counts: Counts = "beats") -> Iterator[None]:
        """Name the phase inside the block; `step` is the last finished one, if any."""
        before = self.phase, self.step, self._counts
        self.beats += 1
        self.phase, self.step, self._counts = phase, step, counts
        try:
            yield
        finally:
            self.beats += 1
            self.phase, self.step, self._counts = before

    def progress(self) -> int:
        """Return the count; called by one thread, again and again: activity counts where there was some since then."""
        counts = self._counts
        if counts != "beats":
            self._activity.look()
            done = int(self._activity.moved // MIB) + (int(self._activity.seconds) if counts == "work" else 0)
            self._active += done != self._done
            self._done = done
        return self.beats + self._active


class Activity:
    """Adds up what this process and its children do, without what looking at it takes.

    moved: bytes read and written. seconds: processor time, of all threads but the one that looks.
    """

    def __init__(self) -> None:
        self.moved, self.seconds = 0, 0.0
        self._own = 0
        self._children: dict[int, int] = {}

    def look(self) -> None:
        """Add what was done since the last look."""
        import psutil  # the launchers, which import this file, do not need it

        self.moved += _moved(os.getpid()) - self._own
        this, children = psutil.Process(), {}  # which reads a file, too
        seconds = sum(this.cpu_times()[:2]) - time.thread_time()
        for child in this.children(recursive=True):
            with suppress(psutil.Error, OSError):  # it has ended, or its numbers are not for this user
                children[child.pid] = _moved(child.pid)
                self.moved += max(0, children[child.pid] - self._children.get(child.pid, 0))
                seconds += sum(child.cpu_times()[:2])
        self._children, self.seconds = children, seconds
        # Reading the numbers reads files, too, this last time as many bytes as the time before.
        once = _moved(this.pid)
        twice = _moved(this.pid)
        self._own = 2 * twice - once


def _moved(pid: int) -> int:
    """Return the bytes that a process has read and written, those of mapped files included."""
    try:
        with open(f"/proc/{pid}/io", encoding="ascii") as file:
            numbers = dict(line.split(": ") for line in file.read().splitlines())
    except FileNotFoundError:  # another system than Linux
        return 0
    return sum(int(numbers[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))
