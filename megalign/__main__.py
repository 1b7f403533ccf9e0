"""megalign's sub-commands.

Run: python -m megalign train CONFIG.yaml [key.sub=value ...]      alone, or under torchrun
     python -m megalign rollout CONFIG.yaml [key.sub=value ...]
"""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import NoReturn

import psutil
import torch.distributed as dist

from megalign.config import JobConfig, load_config
from megalign.config_file import hinted_run_dir
from megalign.runtime.command_line import Parser
from megalign.runtime.distributed import MeetingError, World, launched, process_group
from megalign.runtime.quiet import quiet_libraries
from megalign.runtime.status import BAD_INPUT, DONE, FAILED, Ending, explain, guarded, leave, refuse, write_status
from megalign.schema import UserError

TIMEOUT_S = 600.0  # of the ranks' meeting where no configuration says another


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line (`sys.argv` where nothing is given) and run one sub-command; its exit code."""
    quiet_libraries()
    parser = Parser(prog="python -m megalign", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "train": "train by a configuration, alone or under torchrun",
        "rollout": "sample and reward responses as JSONL groups",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("config", help="YAML file")
        command.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = argparse.Namespace(config=None)
    return guarded(
        lambda: _run(parser, arguments, args), lambda: args.config and hinted_run_dir(args.config, args.overrides)
    )


def _run(parser: argparse.ArgumentParser, arguments: list[str] | None, args: argparse.Namespace) -> int:
    """Join the ranks and run the command; fills `args`."""
    problem: UserError | None = None
    cfg: JobConfig | None = None
    try:
        parser.parse_args(arguments, args)
        cfg = load_config(args.config, args.overrides)
    except UserError as error:
        problem = error
    _, num_ranks, _ = launched()  # after the command line, which says where the status belongs
    if problem is not None and num_ranks == 1:
        raise problem

    def work(world: World) -> int:
        from megalign.train.session import on_every_rank

        if problem is not None or cfg is None:
            return on_every_rank(lambda: _raise(problem))
        if args.command == "train":
            from megalign.train.loop import train

            return train(cfg, world, ending)
        return _rollout(cfg, world, ending)

    run_dir = cfg.run.dir if cfg is not None else args.config and hinted_run_dir(args.config, args.overrides)
    ending = Ending(run_dir)
    try:
        with process_group(timeout_s=cfg.watchdog.timeout_s if cfg is not None else TIMEOUT_S) as world:
            return _on_rank(work, world, ending)
    except MeetingError as error:
        print(f"megalign: failed: {error}", file=sys.stderr, flush=True)
        ending.write(FAILED, str(error), None)
        return FAILED


def _raise(problem: UserError | None) -> NoReturn:
    raise problem or UserError("no configuration")


def _on_rank(work: Callable[[World], int], world: World, ending: Ending) -> int:
    """Do this rank's work; a failure here ends the process at once, so that the launcher ends the others."""
    from megalign.train.session import SharedError

    try:
        return work(world)
    except SharedError as error:
        if world.is_main:
            refuse(error, ending.run_dir, taken=ending.taken)
        dist.barrier()  # a launcher ends all ranks once one has ended; rank 0 has told by then
        return BAD_INPUT
    except UserError as error:
        if world.size == 1:
            return refuse(error, ending.run_dir, taken=ending.taken)
        # Not heard of by the others, who may wait for this rank: as with a failure, only its end frees them.
        shown = UserError(f"rank {world.rank} of {world.size}: {error}")
        _end(refuse(shown, ending.run_dir, taken=ending.taken))
    except (Exception, SystemExit) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, when another rank has failed too: tell first
        told, step = explain(error)
        who = f"rank {world.rank} of {world.size}"
        if world.size > 1 and ending.told_by_another(error):
            print(f"megalign: {who} ends with the rank that failed first ({told})", file=sys.stderr, flush=True)
            _end(FAILED)
        ending.write(FAILED, f"{who}: {told}", step)
        traceback.print_exc()
        print(f"megalign: failed: {who}: {told}", file=sys.stderr, flush=True)
        _end(FAILED)


def _end(code: int) -> NoReturn:
    """End this process at once, so that the launcher ends the others."""
    # Helper processes of a checkpoint writer would outlive this one and keep its pipes open.
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()
    # Without leaving the process group: destroying it would wait for ranks that wait for this one.
    leave(code)


def _rollout(cfg: JobConfig, world: World, ending: Ending) -> int:
    from megalign.rollout.command import load_sampler, write_rollouts
    from megalign.train.check import Inputs, check
    from megalign.train.outputs import with_date
    from megalign.train.run_dir import check_run_dir
    from megalign.train.session import gather, on_every_rank

    def read() -> Inputs:
        if cfg.rollout is None:
            raise UserError("rollout is missing; the command rollout needs the section")
        if world.is_main:
            check_run_dir(Path(cfg.run.dir))
        return check(cfg, world.size)

    cfg = with_date(cfg, gather(cfg.data.date or date.today().isoformat())[0])  # rank 0's day is every rank's
    inputs = on_every_rank(read)
    on_every_rank(lambda: Path(cfg.run.dir, "status.json").unlink(missing_ok=True) if world.is_main else None)
    ending.take_over()
    for note in inputs.notes if world.is_main else ():
        print(note, flush=True)
    sampler = load_sampler(inputs.hf_dir, dtype=cfg.run.dtype, device=world.device)
    on_every_rank(
        lambda: write_rollouts(
            cfg, sampler, inputs.tokenizer, inputs.prompts, rank=world.rank, num_ranks=world.size, gather=gather
        )
    )
    if world.is_main:
        write_status(cfg.run.dir, DONE, "done", None)
    return DONE


if __name__ == "__main__":
    leave(main())
