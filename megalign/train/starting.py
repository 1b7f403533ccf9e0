"""Agrees on what a job starts from: rank 0 finds it, and all ranks read their shares of it to see that it is whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megalign.config.job import JobConfig
from megalign.runtime.distributed import World
from megalign.runtime.ranks import gather, on_every_rank
from megalign.train.checkpoint_facts import Damaged
from megalign.train.checkpoint_files import check_share
from megalign.train.inputs import Inputs
from megalign.train.outputs import Start, check_outputs


def agree_on_start(cfg: JobConfig, inputs: Inputs, world: World) -> Start:
    """Return the start that `check_outputs` finds, the same on every rank; called on all of them.

    A checkpoint whose contents are not what was written is passed over as a damaged one.
    """
    damaged: dict[Path, str] = {}
    while True:
        # Only rank 0 looks: the directory changes while other ranks would still be reading it.
        start: Start = gather(on_every_rank(lambda: check_outputs(cfg, inputs, damaged) if world.is_main else None))[0]
        held = start.checkpoint or start.weights
        start = replace(start, damaged=frozenset(damaged))
        if held is None:
            return start
        problem = next(filter(None, gather(_damage(held, world))), None)
        if problem is None:
            return start
        damaged[held] = problem


def _damage(folder: Path, world: World) -> str:
    """Return what is wrong in this rank's share of a checkpoint's files, "" if nothing is."""
    try:
        check_share(folder, rank=world.rank, num_ranks=world.size)
    except Damaged as error:
        return str(error)
    return ""
