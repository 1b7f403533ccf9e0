"""Runs the command verify: compares two checkpoints tensor by tensor.

Run: python -m megalign verify A B      (or python tools/verify_checkpoint.py A B)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megalign.runtime.command_line import ToolParser, expanded, program
from megalign.runtime.progress import ByteBar
from megalign.runtime.status import stoppable

HELP = """Compare two checkpoints tensor by tensor: Hugging Face directories or megalign checkpoints.

    {prog} A B

A run directory means its newest checkpoint. A megalign checkpoint is compared under its Hugging Face tensor names, with
adapters merged. Prints a table of differences and a summary. Exit code: 0 if every tensor is equal bit by
bit, 1 if not, 2 for wrong input, 75 stopped by a signal.
"""


def main(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit code; prog: how it was called."""
    prog = prog or f"{program()} verify"
    parser = ToolParser(HELP.format(prog=prog), prog=prog)
    parser.add_argument("a", type=Path, help="checkpoint directory")
    parser.add_argument("b", type=Path, help="checkpoint directory")
    parser.add_argument("--rows", type=int, default=50, help="largest number of rows in the table (50)")
    args = parser.parse_intermixed_args(arguments)  # options may stand between the directories

    def verify() -> int:
        # Imported here: it takes two seconds, which --help and a wrong command line should not wait for.
        from megalign.convert.report import compare
        from megalign.train.resume_point import whole_checkpoint

        with ByteBar("comparing", Console(stderr=True)) as bar:
            a, b = (whole_checkpoint(path).folder or path for path in map(expanded, (args.a, args.b)))
            result = compare(a, b, begin=bar.begin, read=bar.wrote)
        console = Console(width=max(Console().width, 160))
        if result.differences:
            console.print(result.table(args.rows))
        console.print(result.summary(), soft_wrap=True, highlight=False)
        return 1 if result.differences else 0

    return stoppable(verify)
