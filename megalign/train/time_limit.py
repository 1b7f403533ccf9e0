"""Decides when training must stop so that a checkpoint is written before Slurm ends the job."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import datetime

from megalign.train.console import duration

# For what takes longer than it has so far, and for clocks of machines that differ.
RESERVE_S = 60.0
RESERVE_SHARE = 0.1  # of the time there is: a job of five minutes must not spend most of them on the reserve


@dataclass
class TimeLimit:
    """Compares the time until Slurm ends the job with what a step and a save have taken in this process.

    ends: seconds since the epoch; None where nothing ends the job.
    """

    ends: float | None = None
    reserve_s: float = RESERVE_S
    longest_step_s: float = 0.0
    longest_save_s: float | None = None
    looked: float = field(default_factory=time.perf_counter)

    def begin(self) -> str:
        """Start measuring steps; return a line about the limit for the log, "" without one."""
        self.looked = time.perf_counter()
        if self.ends is None:
            return ""
        left = self.ends - time.time()
        if left <= 0:  # the end of another job, whose environment this process was given
            self.ends = None
            return ""
        self.reserve_s = min(RESERVE_S, RESERVE_SHARE * left)
        end = datetime.fromtimestamp(self.ends).astimezone().isoformat(sep=" ", timespec="seconds")
        few = "; a step and a save must fit in, so give such jobs more time" if left < RESERVE_S else ""
        return f"Slurm ends this job at {end}, in {duration(left)}: training stops before, in time to save{few}"

    def saved(self, seconds: float) -> None:
        """Note how long a checkpoint took."""
        self.longest_save_s = max(self.longest_save_s or 0.0, seconds)

    def why_stop(self) -> str:
        """Return why the job must save now, after a step, or "" if there is time for another step and a save.

        The time since the last call counts as that of a step: with what was sampled, evaluated, saved or exported.
        """
        now = time.perf_counter()
        self.longest_step_s, self.looked = max(self.longest_step_s, now - self.looked), now
        if self.ends is None:
            return ""
        left = self.ends - time.time()
        # A save that was not seen yet is taken to need as long as the reserve.
        save = self.reserve_s if self.longest_save_s is None else self.longest_save_s
        if left > self.longest_step_s + save + self.reserve_s:
            return ""
        took = f"a step took up to {duration(self.longest_step_s)}"
        took += "" if self.longest_save_s is None else f", a save {duration(save)}"
        return f"Slurm ends this job in {duration(max(left, 0.0))} ({took})"
