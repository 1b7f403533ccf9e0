"""Compare two checkpoints tensor by tensor, each a Hugging Face directory or a Megatron one of ours.

    python tools/verify_checkpoint.py A B

A run directory stands for its newest checkpoint. A Megatron checkpoint is compared under the Hugging Face names of its
weights, its adapters merged. Prints a table of what differs and a summary. Exit code: 0 if every tensor is equal bit by
bit, 1 if not, 2 for wrong input, 75 stopped by a signal.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from megalign.convert.checkpoint_dir import find_checkpoint_dir
from megalign.convert.report import compare
from megalign.runtime.command_line import ToolParser, expanded
from megalign.runtime.progress import ByteBar
from megalign.runtime.status import stoppable


def main(arguments: list[str] | None = None) -> int:
    parser = ToolParser(__doc__)
    parser.add_argument("a", type=Path, help="checkpoint directory")
    parser.add_argument("b", type=Path, help="checkpoint directory")
    parser.add_argument("--rows", type=int, default=50, help="of the table (50)")
    args = parser.parse_intermixed_args(arguments)  # options may stand between the directories

    def verify() -> int:
        with ByteBar("comparing", Console(stderr=True)) as bar:
            a, b = (find_checkpoint_dir(expanded(one)) for one in (args.a, args.b))
            result = compare(a, b, begin=bar.begin, read=bar.wrote)
        console = Console(width=max(Console().width, 160))
        if result.differences:
            console.print(result.table(args.rows))
        console.print(result.summary(), soft_wrap=True, highlight=False)
        return 1 if result.differences else 0

    return stoppable(verify)


if __name__ == "__main__":
    sys.exit(main())
