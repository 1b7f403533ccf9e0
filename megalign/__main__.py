"""Runs one of megalign's commands: `python -m megalign COMMAND ...`, or `megalign COMMAND ...` if installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from megalign.config.yaml_file import hinted_run_dir
from megalign.runtime.command_line import parse_job, program, without_command, without_local_rank
from megalign.runtime.parent import end_with_parent
from megalign.runtime.quiet import quiet_libraries
from megalign.runtime.status import guarded, leave
from megalign.runtime.stop import Stop
from megalign.runtime.streams import lasting


class Command(NamedTuple):
    """Describes a command: `module:function`, imported only when it runs, and its line of help.

    The function takes the arguments after the command's name and returns the exit code. A job's function runs on every
    rank and takes (cfg, world, ending) instead.
    """

    function: str
    about: str
    is_job: bool = False

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        module, _, function = self.function.partition(":")
        return getattr(import_module(module), function)


COMMANDS = {
    "train": Command("megalign.train.loop:train", "train by a configuration, alone or under torchrun", True),
    "rollout": Command("megalign.train.rollout_job:rollout", "sample and reward responses as JSONL groups", True),
    "launch": Command("megalign.runtime.launch:main", "train on N processes of this machine, after one plain check"),
    "doctor": Command("megalign.doctor.command:main", "check machine, network and inputs before a job starts"),
    "example": Command("megalign.commands.example:main", "print an example configuration, or list them"),
    "convert": Command("megalign.commands.convert:main", "turn a Hugging Face checkpoint into a Megatron one"),
    "export": Command("megalign.commands.export:main", "turn a Megatron checkpoint into a Hugging Face one"),
    "verify": Command("megalign.commands.verify:main", "compare two checkpoints tensor by tensor"),
    "compare": Command("megalign.commands.compare:main", "compare the logits of two Hugging Face checkpoints"),
    "keys": Command("megalign.commands.keys:main", "print type, default and meaning of configuration keys"),
    "check-loss": Command("megalign.commands.check_loss:main", "check a loss of one's own on small random scores"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name (`sys.argv` without any) and return its exit code."""
    quiet_libraries()
    name, *rest = without_local_rank(sys.argv[1:] if arguments is None else arguments) or [""]
    command = COMMANDS.get(name)
    if command is None:
        abouts = {known: command.about for known, command in COMMANDS.items()}
        return guarded(lambda: without_command([name, *rest] if name else rest, abouts))
    return _run_job(name, command, rest) if command.is_job else command.load()(rest)


def _run_job(name: str, command: Command, arguments: Sequence[str]) -> int:
    """Run a command on this rank of a job."""
    with lasting("stdout", "stderr"), Stop().listening() as stop:
        end_with_parent()
        args, problem = parse_job(name, command.about, arguments)  # --help ends here

        def run() -> int:
            from megalign.runtime.job import run_job  # imports torch, which --help need not wait for

            return run_job(args, problem, command.load, stop)

        return guarded(run, lambda: hinted_run_dir(args.config, args.overrides))


def script() -> NoReturn:
    """Run the command line and end the process: the installed script `megalign`."""
    if program() == "megalign":
        sys.path.insert(0, os.getcwd())  # as `python -m` does: losses and rewards of the user's own may lie there
    leave(main())


if __name__ == "__main__":
    script()
