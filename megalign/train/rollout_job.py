"""Runs the command `rollout` on every rank of a job.

Run: python -m megalign rollout CONFIG.yaml [key.sub=value ...]
"""

from __future__ import annotations

from datetime import date
from functools import partial
from pathlib import Path

from megalign.config.job import JobConfig
from megalign.engines.build import dtype_of
from megalign.rollout.command import write_rollouts
from megalign.runtime.distributed import World
from megalign.runtime.exit_codes import DONE
from megalign.runtime.ranks import gather, on_every_rank
from megalign.runtime.status import Ending, write_status
from megalign.schema import UserError
from megalign.train.check import check
from megalign.train.inputs import Inputs
from megalign.train.outputs import with_date
from megalign.train.run_dir import check_run_dir
from megalign.train.stopping import leave_if_asked, unless_stopped_early


def rollout(cfg: JobConfig, world: World, ending: Ending) -> int:
    """Sample and reward all rounds with the model's weights as they are; return the exit code. Called on every rank."""
    return unless_stopped_early(lambda: _rollout(cfg, world, ending), world, ending)


def _rollout(cfg: JobConfig, world: World, ending: Ending) -> int:
    """Sample and write; StoppedEarly on every rank where a signal stops the job before its last round."""

    def read() -> Inputs:
        if cfg.rollout is None:
            raise UserError("rollout is missing; the command rollout needs the section")
        if world.is_main:
            check_run_dir(Path(cfg.run.dir))
        with ending.heart.during("reading the inputs", counts="work"):
            return check(cfg, world.size)

    cfg = with_date(cfg, gather(cfg.data.date or date.today().isoformat())[0])  # rank 0's day is every rank's
    inputs = on_every_rank(read)
    on_every_rank(lambda: Path(cfg.run.dir, "status.json").unlink(missing_ok=True) if world.is_main else None)
    ending.take_over()
    leave = partial(leave_if_asked, ending.stop, world, before="the last round, and nothing was written")
    leave()
    for note in inputs.notes if world.is_main else ():
        print(note, flush=True)
    from megalign.rollout.transformers_sampler import load_sampler  # transformers' models take seconds to import

    dtype, device, beat = dtype_of(cfg), world.device, world.beat
    with ending.heart.during("loading the model", counts="bytes"):
        sampler = load_sampler(inputs.policy.folder, inputs.tokenizer, dtype=dtype, device=device, beat=beat)
    on_every_rank(
        lambda: write_rollouts(
            cfg,
            sampler,
            inputs.tokenizer,
            inputs.prompts,
            rank=world.rank,
            num_ranks=world.size,
            gather=gather,
            beat=beat,
            between=leave,
        )
    )
    if world.is_main:
        write_status(cfg.run.dir, DONE, "done", None)
    return DONE
