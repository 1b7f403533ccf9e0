"""Runs a command on all ranks of a job: reads its configuration, joins the ranks, and ends them together."""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import NoReturn, TypeAlias

import psutil
import torch.distributed as dist

from megalign.config.job import JobConfig, load_config
from megalign.config.yaml_file import hinted_run_dir
from megalign.runtime.discovery import adopt_launcher
from megalign.runtime.distributed import COLLECTIVE_S, MeetingError, World, launched, process_group
from megalign.runtime.exit_codes import FAILED
from megalign.runtime.ft_launcher import launcher_heartbeat
from megalign.runtime.ranks import SharedError, barrier, on_every_rank
from megalign.runtime.status import Ending, code_of, explain, is_consequence, leave, refuse, write_result
from megalign.runtime.stop import Stop
from megalign.runtime.watchdog import Watchdog
from megalign.schema import UserError

KIND_OF_ERROR = re.compile(r":? ?\w*Error: ")
TIMEOUT_S = 600.0  # for joining the ranks where no configuration could be read

Run: TypeAlias = Callable[[JobConfig, World, Ending], int]


def run_job(args: argparse.Namespace, problem: UserError | None, load: Callable[[], Run], stop: Stop) -> int:
    """Read the configuration, join the ranks and run what `load` imports on each of them; return the exit code.

    problem: what is wrong with the command line, if anything; it is raised on every rank. stop: listens to signals.
    """
    read = _read(args) if problem is None else problem

    def valid() -> JobConfig:
        if isinstance(read, UserError):
            raise read
        return read

    def work(world: World) -> int:
        cfg = on_every_rank(valid)  # raised on all ranks together; another machine may hold another file
        with ending.heart.during("importing the program", counts="work"):  # minutes on a slow file system
            run = load()
        return run(cfg, world, ending)

    run_dir: str | None
    if isinstance(read, JobConfig):
        run_dir, timeout_s = read.run.dir, read.watchdog.timeout_s
    else:
        run_dir, timeout_s = hinted_run_dir(args.config, args.overrides), TIMEOUT_S
    ending = Ending(run_dir, stop=stop)
    stop.report = partial(_report_signal, ending)
    try:
        adopt_launcher(timeout_s)
        _, num_ranks, _ = launched()  # after the command line, which names the directory for the status
        if isinstance(read, UserError) and num_ranks == 1:
            raise read
        watch = partial(_watch, ending, timeout_s)
        with process_group(timeout_s=timeout_s, collective_s=COLLECTIVE_S, before=watch) as world:
            return work_on_rank(work, replace(world, beat=ending.heart.beat), ending)
    except MeetingError as error:
        print(f"megalign: failed: {error}", file=sys.stderr, flush=True)
        ending.write(FAILED, str(error), None)
        return FAILED
    finally:
        if ending.watchdog is not None:
            ending.watchdog.close()


def _report_signal(ending: Ending, code: int, reason: str) -> None:
    """Report a signal that ends this process at once; before it takes the directory over there is no run there."""
    if code == FAILED or ending.taken:
        ending.write(code, reason, ending.heart.step)
    else:
        write_result(code, replace=False)


def _watch(ending: Ending, timeout_s: float, world: World, store: dist.Store) -> None:
    """Start the watchdog once the ranks have met: to connect to each other they wait, too."""
    if world.size > 1:
        ending.stop.wait_for_step()  # a rank that ended by itself would look like one that died
    watchdog = Watchdog(
        ending.heart,
        rank=world.rank,
        size=world.size,
        timeout_s=timeout_s,
        write=partial(ending.write, FAILED),
        also=launcher_heartbeat(),
    )
    watchdog.start(store)
    ending.watchdog = watchdog


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
        barrier()  # a launcher ends all ranks once one has ended; rank 0 has reported by then
        return code_of(error)
    except UserError as error:
        if world.size == 1:
            return refuse(error, ending.run_dir, taken=ending.taken)
        # The others do not know of it and may wait for this rank: as with a failure, only its end frees them.
        ending.stop.ignore()
        shown = UserError(f"rank {world.rank} of {world.size}: {error}")
        shown.doing, shown.step = error.doing, error.step
        _end(refuse(shown, ending.run_dir, taken=ending.taken), ending)
    except BaseException as error:  # signals raise nothing here: who reads `KeyboardInterrupt` has code that raised it
        ending.stop.ignore()
        if ending.watchdog is not None:
            ending.watchdog.await_end()
        reason, step = explain(error)
        who = f"rank {world.rank} of {world.size}"
        if world.size > 1 and ending.reported_by_another(error):
            print(f"megalign: {who} ends with the rank that failed first ({reason})", file=sys.stderr, flush=True)
            _end(FAILED, ending)
        told = f"{who}: {reason}"
        if world.size > 1 and is_consequence(error) and (missing := ending.missing()):
            told = f"{missing}; {who} waited for it in {KIND_OF_ERROR.split(reason)[0]}"
        ending.write(FAILED, told, step)
        traceback.print_exc()
        print(f"megalign: failed: {told}", file=sys.stderr, flush=True)
        _end(FAILED, ending)


def _end(code: int, ending: Ending) -> NoReturn:
    """End this process at once, so that the launcher ends the others."""
    if ending.watchdog is not None:
        ending.watchdog.leave()
    # Helper processes of a checkpoint writer would outlive this one and keep its pipes open.
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()
    # Without leaving the process group: destroying it would wait for ranks that wait for this one.
    leave(code)
