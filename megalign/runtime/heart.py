"""Counts a rank's progress and names what the rank is doing, for a watchdog that looks from another thread."""

from __future__ import annotations

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
        self._activity = self._active = 0

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
        """Return the count; called by one thread, again and again: activity counts where it differs from the last."""
        counts = self._counts
        if counts != "beats" and (activity := _activity(counts)) != self._activity:
            self._activity = activity
            self._active += 1
        return self.beats + self._active


def _activity(counts: Counts) -> int:
    """Return how much this process and its children have done: MiB read and written, with "work" seconds too."""
    import psutil  # the launchers, which import this file, do not need it

    this, total = psutil.Process(), 0.0
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.Error, OSError):  # it has ended, or its numbers are not for this user
            total += _moved(process.pid) // MIB
            if counts == "work":
                times = process.cpu_times()
                total += int(times.user + times.system)
    return int(total)


def _moved(pid: int) -> int:
    """Return the bytes that a process has read and written, those of mapped files included."""
    with open(f"/proc/{pid}/io", encoding="ascii") as file:
        numbers = dict(line.split(": ") for line in file.read().splitlines())
    return sum(int(numbers[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))
