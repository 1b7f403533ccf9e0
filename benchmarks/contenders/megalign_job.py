"""Runs a whole job, `megalign train CONFIG.yaml [key.sub=value ...]`, and notes the ends of its steps.

Started by benchmarks.engines, once a rank: python -m benchmarks.contenders.megalign_job OUTPUT STEPS CONFIG.yaml ...
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contenders.clock import Clock
from megalign.__main__ import main as megalign
from megalign.train import loop
from megalign.train.hooks import StepDone
from megalign.train.job import Job


def main(arguments: Sequence[str]) -> int:
    """Train to the last step and leave there: what follows, the checkpoint, is not measured."""
    clock = Clock(Path(arguments[0]), int(arguments[1]))

    def note(job: Job, done: StepDone) -> None:
        # Tokens are those of the whole job.
        if clock.step(int(done.metrics["tokens"]) if job.world.is_main else 0):
            sys.stderr.flush()
            os._exit(0)

    loop.STEP_HOOKS = (*loop.STEP_HOOKS, note)
    return megalign(["train", *arguments[2:], f"run.dir={os.environ['SCRATCH']}/run", f"run.steps={clock.steps}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
