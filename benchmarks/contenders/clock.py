"""Notes when training steps end and what they have cost so far; imports the standard library alone."""

from __future__ import annotations

import json
import time
from pathlib import Path


class Clock:
    """Collects this rank's (time, CPU seconds, tokens) at the end of each step and writes them after the last."""

    def __init__(self, output: Path, steps: int) -> None:
        self.output, self.steps = output, steps
        self.ends: list[tuple[float, float, int]] = []

    def step(self, tokens: int) -> bool:
        """Note the end of a step on `tokens` tokens; return whether it was the last, whose record is on the disk."""
        self.ends.append((time.time(), time.process_time(), tokens))
        last = len(self.ends) == self.steps
        if last:
            self.output.write_text(json.dumps({"ends": self.ends, "peak": peak_bytes()}), encoding="utf-8")
        return last


def peak_bytes() -> int:
    """Return the largest resident memory that this process has had; 0 where the system does not tell."""
    try:
        # Not getrusage: its figure begins with that of the process that started this one.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
