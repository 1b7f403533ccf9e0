"""Defines the arguments that the commands `convert` and `export` share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from megalign.runtime.command_line import ToolParser, expanded
from megalign.runtime.progress import ByteBar
from megalign.schema import UserError

if TYPE_CHECKING:
    from megalign.convert.transfer import ConversionOptions

AFTERWARDS = "; the same command goes on where it was"  # appended to the message of a stopped conversion


def add_target(parser: ToolParser, size_option: str) -> None:
    """Add the arguments for output directory, number of workers, file size and dry run."""
    parser.add_argument("out_dir", type=Path, nargs="?", help="new or empty directory")
    parser.add_argument("--workers", type=int, default=2, help="number of threads; each holds one tensor at a time (2)")
    parser.add_argument(size_option, type=float, default=5.0, dest="gb", help="size of the files, in 10^9 bytes (5)")
    parser.add_argument("--dry-run", action="store_true", help="check the checkpoint, print the tensor map and stop")


def write_target(
    args: argparse.Namespace,
    *,
    source: object,
    name: str,
    size_option: str,
    write: Callable[[Path, ConversionOptions], None],
) -> int:
    """Check the arguments of `add_target` and call `write` with directory and options, showing a progress bar.

    name: the name of the output directory's argument, for errors.
    """
    if args.out_dir is None:
        raise UserError(f"{name} is missing; must be a new or empty directory, or --dry-run")
    if args.workers < 1 or not 0 < args.gb < math.inf:
        raise UserError(f"--workers must be 1 or more, {size_option} a number more than 0")
    from megalign.convert.transfer import ConversionOptions

    out_dir, console = expanded(args.out_dir), Console(stderr=True)
    with ByteBar(f"{source} -> {out_dir}", console) as bar:
        options = ConversionOptions(args.workers, int(args.gb * 1e9), begin=bar.begin, wrote=bar.wrote)
        write(out_dir, options)
    console.print(f"{out_dir} is written")
    return 0


def print_map(table: Table) -> None:
    """Print a tensor map in at least 160 columns."""
    Console(width=max(Console().width, 160)).print(table)
