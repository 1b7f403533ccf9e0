"""Runs a command on all ranks of a job: reads its configuration, joins the ranks, and ends them together."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, TypeAlias

import psutil
import torch.distributed as dist

from megalign.config.job import JobConfig, load_config
from megalign.config.yaml_file import hinted_run_dir
from megalign.runtime.discovery import adopt_launcher
from megalign.runtime.distributed import MeetingError, World, launched, process_group
from megalign.runtime.ranks import SharedError, on_every_rank
from megalign.runtime.status import FAILED, Ending, code_of, explain, leave, refuse
from megalign.schema import UserError

TIMEOUT_S = 600.0  # for joining the ranks where no configuration could be read

Run: TypeAlias = Callable[[JobConfig, World, Ending], int]


def run_job(args: argparse.Namespace, problem: UserError | None, load: Callable[[], Run]) -> int:
    """Read the configuration, join the ranks and run what `load` imports on each of them; return the exit code.

    problem: what is wrong with the command line, if anything; it is raised on every rank.
    """
    read = _read(args) if problem is None else problem

    def valid() -> JobConfig:
        if isinstance(read, UserError):
            raise read
        return read

    def work(world: World) -> int:
        cfg = on_every_rank(valid)  # raised on all ranks together; another machine may hold another file
        return load()(cfg, world, ending)

    run_dir: str | None
    if isinstance(read, JobConfig):
        run_dir, timeout_s = read.run.dir, read.watchdog.timeout_s
    else:
        run_dir, timeout_s = hinted_run_dir(args.config, args.overrides), TIMEOUT_S
    ending = Ending(run_dir)
    try:
        adopt_launcher(timeout_s)
        _, num_ranks, _ = launched()  # after the command line, which names the directory for the status
        if isinstance(read, UserError) and num_ranks == 1:
            raise read
        with process_group(timeout_s=timeout_s) as world:
            return work_on_rank(work, world, ending)
    except MeetingError as error:
        print(f"megalign: failed: {error}", file=sys.stderr, flush=True)
        ending.write(FAILED, str(error), None)
        return FAILED


def _read(args: argparse.Namespace) -> JobConfig | UserError:
    """Return the configuration, or what is wrong with it."""
    try:
        return load_config(args.config, args.overrides)
    except UserError as error:
        return error


def work_on_rank(work: Callable[[World], int], world: World, ending: Ending) -> int:
    """Do this rank's work; a failure here ends the process at once, so that the launcher ends the others."""
    try:
        return work(world)
    except SharedError as error:
        if world.is_main:
            refuse(error, ending.run_dir, taken=ending.taken)
        dist.barrier()  # a launcher ends all ranks once one has ended; rank 0 has reported by then
        return code_of(error)
    except UserError as error:
        if world.size == 1:
            return refuse(error, ending.run_dir, taken=ending.taken)
        # The others do not know of it and may wait for this rank: as with a failure, only its end frees them.
        shown = UserError(f"rank {world.rank} of {world.size}: {error}")
        shown.doing, shown.step = error.doing, error.step
        _end(refuse(shown, ending.run_dir, taken=ending.taken))
    except (Exception, SystemExit) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, if another rank has failed too: report first
        reason, step = explain(error)
        who = f"rank {world.rank} of {world.size}"
        if world.size > 1 and ending.reported_by_another(error):
            print(f"megalign: {who} ends with the rank that failed first ({reason})", file=sys.stderr, flush=True)
            _end(FAILED)
        ending.write(FAILED, f"{who}: {reason}", step)
        traceback.print_exc()
        print(f"megalign: failed: {who}: {reason}", file=sys.stderr, flush=True)
        _end(FAILED)


def _end(code: int) -> NoReturn:
    """End this process at once, so that the launcher ends the others."""
    # Helper processes of a checkpoint writer would outlive this one and keep its pipes open.
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()
    # Without leaving the process group: destroying it would wait for ranks that wait for this one.
    leave(code)
