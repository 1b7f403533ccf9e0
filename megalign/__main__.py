"""megalign's sub-commands.

Run: python -m megalign train CONFIG.yaml [key.sub=value ...]      alone, or under torchrun
     python -m megalign rollout CONFIG.yaml [key.sub=value ...]
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

import psutil

from megalign.config import JobConfig, load_config
from megalign.config_file import hinted_run_dir
from megalign.runtime.distributed import World, launched, process_group
from megalign.runtime.status import guarded, write_status
from megalign.schema import UserError


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line (`sys.argv` where nothing is given) and run one sub-command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m megalign", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "train": "train by a configuration, alone or under torchrun",
        "rollout": "sample and reward responses as JSONL groups",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("config", help="YAML file")
        command.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_args(arguments)
    return guarded(
        lambda: _run(args.command, args.config, args.overrides), lambda: hinted_run_dir(args.config, args.overrides)
    )


def _run(command: str, config: str, overrides: list[str]) -> int:
    rank, _, _ = launched()
    try:
        cfg = load_config(config, overrides)
    except UserError:
        if rank != 0:  # every rank reads the same file; one of them tells
            return 2
        raise
    with process_group(timeout_s=cfg.watchdog.timeout_s) as world:
        return _on_rank(command, cfg, world)


def _on_rank(command: str, cfg: JobConfig, world: World) -> int:
    """Run the command on this rank; a failure here ends the process at once, so that the launcher ends the others."""
    from megalign.train.session import SharedError

    try:
        if command == "train":
            from megalign.train.loop import train

            return train(cfg, world)
        return _rollout(cfg, world)
    except SharedError:
        if not world.is_main:
            return 2
        raise
    except UserError:
        raise
    except Exception as error:
        traceback.print_exc()
        reason = f"rank {world.rank} of {world.size}: {type(error).__name__}: {error}"
        print(f"megalign: failed: {reason}", file=sys.stderr, flush=True)
        if Path(cfg.run.dir).is_dir():
            write_status(cfg.run.dir, 1, reason, None)
        # Helper processes of a checkpoint writer would outlive this one and keep its pipes open.
        for child in psutil.Process().children(recursive=True):
            child.kill()
        # Without leaving the process group: destroying it would wait for ranks that wait for this one.
        sys.stdout.flush()
        os._exit(1)


def _rollout(cfg: JobConfig, world: World) -> int:
    from megalign.rollout.command import load_sampler, write_rollouts
    from megalign.train.check import check
    from megalign.train.rounds import gather
    from megalign.train.session import on_every_rank

    inputs = on_every_rank(lambda: check(cfg, world.size))
    sampler = load_sampler(inputs.hf_dir, dtype=cfg.run.dtype, device=world.device)
    write_rollouts(cfg, sampler, inputs.tokenizer, inputs.prompts, rank=world.rank, num_ranks=world.size, gather=gather)
    return 0


if __name__ == "__main__":
    sys.exit(main())
