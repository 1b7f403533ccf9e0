"""Command lines that refuse in one line, and arguments that are paths."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from megalign.schema import UserError, expand_path


class Parser(argparse.ArgumentParser):
    """Refuses a command line in one line, as all bad input is."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; must be: {' '.join(self.format_usage().split()[1:])}")


class ToolParser(Parser):
    """A `Parser` of a tool, which ends the process itself; its description is printed as it is written."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        try:
            super().error(message)
        except UserError as error:
            self.exit(2, f"megalign: error: {error}\n")


def expanded(path: Path) -> Path:
    """A path of a command line, with `~` expanded as in configurations."""
    try:
        return Path(expand_path(str(path)))
    except ValueError as error:
        raise UserError(f"command line: {str(path)!r}: {error}") from None
