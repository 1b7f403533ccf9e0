"""Parses command lines, with errors of one line, and expands paths in them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megalign import __version__
from megalign.config.sections import SECTIONS
from megalign.schema import UserError, did_you_mean, expand_path, nearest_name


def program() -> str:
    """Return how megalign was called: the installed script's name, or Python's module."""
    return "megalign" if Path(sys.argv[0]).name == "megalign" else "python -m megalign"


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without the one that the `deepspeed` launcher puts first; LOCAL_RANK says the same."""
    return list(arguments[1:] if arguments and arguments[0].startswith("--local_rank=") else arguments)


class Parser(argparse.ArgumentParser):
    """Parses arguments; its errors are a UserError: one line, as for all bad input."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError that ends with the usage."""
        raise UserError(f"command line: {message}; must be: {' '.join(self.format_usage().split()[1:])}")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments; for an unknown option the error names the nearest known one."""
        namespace, unknown = self.parse_known_args(args, namespace)
        self._refuse(unknown)
        return namespace

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments as `parse_args`; options may stand between positional ones."""
        namespace, unknown = self.parse_known_intermixed_args(args, namespace)
        self._refuse(unknown)
        return namespace

    def _refuse(self, unknown: Sequence[str]) -> None:
        if unknown:
            word = unknown[0].partition("=")[0].lstrip("-")  # without dashes, which would make short words similar
            options = {option.lstrip("-"): option for option in self._option_string_actions}
            nearest = nearest_name(word, list(options))
            guess = f"; did you mean {options[nearest]}?" if nearest else ""
            if word.partition(".")[0] in SECTIONS:
                guess = f"; keys are set without --, as {word}=VALUE"
            self.error(f"unrecognized arguments: {' '.join(unknown)}{guess}")


class ToolParser(Parser):
    """Parses a tool's arguments; an error ends the process, and the description is printed as it is written."""

    def __init__(self, description: str | None, *, prog: str | None = None) -> None:
        super().__init__(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and end the process with code 2."""
        try:
            super().error(message)
        except UserError as error:
            self.exit(2, f"megalign: error: {error}\n")


def whole_number(text: str) -> int:
    """Convert an argument to a whole number of 1 or more; argparse shows the error with the argument's name."""
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(text)


def without_command(arguments: Sequence[str], abouts: Mapping[str, str]) -> NoReturn:
    """Show the help or the version and end, or refuse an unknown command; abouts: {name: line of help}."""
    width = max(map(len, abouts))
    listed = "\n".join(f"  {name:<{width}}  {about}" for name, about in abouts.items())
    parser = Parser(
        prog=program(),
        usage=f"{program()} COMMAND ...",
        epilog=f"commands (COMMAND --help says more):\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megalign {__version__}")
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    args, unknown = parser.parse_known_args(arguments) if arguments else (argparse.Namespace(command=None), [])
    name = args.command
    if name in abouts:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    shown = "missing" if name is None else f"{name!r}{did_you_mean(name, list(abouts))}"
    raise UserError(f"command line: command is {shown}; must be one of {', '.join(abouts)}")


def parse_job(
    command: str, about: str, arguments: Sequence[str], sections: Mapping[str, str] = SECTIONS
) -> tuple[argparse.Namespace, UserError | None]:
    """Parse a job's command line: return (config and overrides, what is wrong with them or None).

    The arguments before the error are kept, so that the run directory that they name can get a status.
    """
    width = max(map(len, sections))
    listed = "\n".join(f"  {name:<{width}}  {text}" for name, text in sections.items())
    parser = Parser(
        prog=f"{program()} {command}",
        description=about,
        epilog=f"sections of a configuration:\n{listed}\n\n"
        f"`{program()} keys SECTION` describes every key, `{program()} example` has whole configurations.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.sub=value", help="keys to set, with their values"
    )
    args = argparse.Namespace(config=None, overrides=[])
    try:
        parser.parse_args(arguments, args)
    except UserError as error:
        return args, error
    return args, None


def expanded(path: Path) -> Path:
    """Return a path with `~` expanded as in configurations."""
    try:
        return Path(expand_path(str(path)))
    except ValueError as error:
        raise UserError(f"command line: {str(path)!r}: {error}") from None
