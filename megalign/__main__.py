"""megalign's sub-commands.

Run: python -m megalign train CONFIG.yaml [key.sub=value ...]      alone, or under torchrun
     python -m megalign rollout CONFIG.yaml [key.sub=value ...]
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import psutil
import torch.distributed as dist

from megalign.config import JobConfig, load_config
from megalign.config_file import hinted_run_dir
from megalign.runtime.distributed import World, launched, process_group
from megalign.runtime.quiet import quiet_libraries
from megalign.runtime.status import BAD_INPUT, DONE, explain, guarded, refuse, write_status
from megalign.schema import UserError

TIMEOUT_S = 600.0  # of the ranks' meeting where no configuration says another


class Parser(argparse.ArgumentParser):
    """Refuses a command line in one line, as all bad input is."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; must be: {' '.join(self.format_usage().split()[1:])}")


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
    _, num_ranks, _ = launched()
    problem: UserError | None = None
    cfg: JobConfig | None = None
    try:
        parser.parse_args(arguments, args)
        cfg = load_config(args.config, args.overrides)
    except UserError as error:
        if num_ranks == 1:
            raise
        problem = error

    def work(world: World) -> int:
        from megalign.train.session import on_every_rank

        if problem is not None or cfg is None:
            return on_every_rank(lambda: _raise(problem))
        if args.command == "train":
            from megalign.train.loop import train

            return train(cfg, world)
        return _rollout(cfg, world)

    run_dir = cfg.run.dir if cfg is not None else args.config and hinted_run_dir(args.config, args.overrides)
    with process_group(timeout_s=cfg.watchdog.timeout_s if cfg is not None else TIMEOUT_S) as world:
        return _on_rank(work, world, run_dir)


def _raise(problem: UserError | None) -> NoReturn:
    raise problem or UserError("no configuration")


def _on_rank(work: Callable[[World], int], world: World, run_dir: str | None) -> int:
    """Do this rank's work; a failure here ends the process at once, so that the launcher ends the others."""
    from megalign.train.session import SharedError

    try:
        return work(world)
    except SharedError as error:
        if world.is_main:
            refuse(error, run_dir)
        dist.barrier()  # a launcher ends all ranks once one has ended; rank 0 has told by then
        return BAD_INPUT
    except UserError as error:
        if world.size == 1:
            raise
        # Not heard of by the others, who may wait for this rank: as with a failure, only its end frees them.
        _end(refuse(UserError(f"rank {world.rank} of {world.size}: {error}"), run_dir))
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, when another rank has failed too: tell first
        traceback.print_exc()
        told, step = explain(error)
        reason = f"rank {world.rank} of {world.size}: {told}"
        print(f"megalign: failed: {reason}", file=sys.stderr, flush=True)
        if run_dir is not None and Path(run_dir).is_dir():
            write_status(run_dir, 1, reason, step)
        _end(1)


def _end(code: int) -> NoReturn:
    """End this process at once, so that the launcher ends the others."""
    # Helper processes of a checkpoint writer would outlive this one and keep its pipes open.
    for child in psutil.Process().children(recursive=True):
        child.kill()
    # Without leaving the process group: destroying it would wait for ranks that wait for this one.
    sys.stdout.flush()
    os._exit(code)


def _rollout(cfg: JobConfig, world: World) -> int:
    from megalign.rollout.command import load_sampler, write_rollouts
    from megalign.train.check import Inputs, check
    from megalign.train.session import gather, on_every_rank

    def read() -> Inputs:
        if cfg.rollout is None:
            raise UserError("rollout is missing; the command rollout needs the section")
        return check(cfg, world.size)

    inputs = on_every_rank(read)
    Path(cfg.run.dir, "status.json").unlink(missing_ok=True)  # an earlier run's
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
    sys.exit(main())
