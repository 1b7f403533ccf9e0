"""Ends a job that a signal stops before there is anything to save, on all ranks together."""

from __future__ import annotations

import sys
from collections.abc import Callable

from megalign.runtime.distributed import World
from megalign.runtime.exit_codes import STOPPED
from megalign.runtime.ranks import barrier, max_over_job
from megalign.runtime.status import Ending
from megalign.runtime.stop import Stop, StoppedEarly


def signalled(stop: Stop) -> str:
    """Return why a job stops of which some rank was sent a signal."""
    return f"stopped by {stop.asked or 'a signal to another rank'}"


def leave_if_asked(stop: Stop, world: World, *, before: str = "the first step") -> None:
    """Raise StoppedEarly on every rank if a signal has reached any; called on all ranks at the same places."""
    if max_over_job(float(bool(stop.asked)), device=world.device):
        raise StoppedEarly(f"{signalled(stop)} before {before}")


def unless_stopped_early(work: Callable[[], int], world: World, ending: Ending) -> int:
    """Return the exit code of `work`, or after StoppedEarly 75, with a line and a status; called on every rank."""
    try:
        return work()
    except StoppedEarly as stopped:
        if world.is_main:
            print(f"megalign: {stopped}; the same command begins anew", file=sys.stderr, flush=True)
            ending.write(STOPPED, str(stopped), None)
        barrier()  # a launcher ends all ranks once one has ended
        return STOPPED
