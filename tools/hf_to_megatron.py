"""Turn a Hugging Face checkpoint into a Megatron `torch_dist` one, which loads at any layout. Needs no GPU.

    python tools/hf_to_megatron.py HF_DIR OUT_DIR
    python tools/hf_to_megatron.py HF_DIR --dry-run

HF_DIR may be hf://org/name or hf://org/name@revision. Interrupted, it goes on where it was when started again. Exit
code: 0; 2 for wrong input, 75 stopped by a signal.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from rich.console import Console

from megalign.convert.report import tensor_map
from megalign.convert.transfer import How, hf_to_megatron
from megalign.runtime.command_line import ToolParser, expanded
from megalign.runtime.progress import ByteBar
from megalign.runtime.status import stoppable
from megalign.schema import UserError


def main(arguments: list[str] | None = None) -> int:
    parser = ToolParser(__doc__)
    parser.add_argument("hf_dir", help="Hugging Face directory, or hf://org/name")
    parser.add_argument("out_dir", type=Path, nargs="?", help="new or empty directory")
    parser.add_argument("--workers", type=int, default=2, help="threads, each of which holds one tensor (2)")
    parser.add_argument("--file-gb", type=float, default=5.0, help="size of the files, in 10^9 bytes (5)")
    parser.add_argument("--allow-pickle", action="store_true", help="also read pytorch_model.bin, plain tensors only")
    parser.add_argument("--dry-run", action="store_true", help="check the checkpoint, print the tensor map and stop")
    args = parser.parse_intermixed_args(arguments)  # options may stand between the directories
    console = Console(stderr=True)

    def convert() -> int:
        if args.dry_run:
            Console(width=max(Console().width, 160)).print(tensor_map(args.hf_dir, allow_pickle=args.allow_pickle))
            return 0
        if args.out_dir is None:
            raise UserError("OUT_DIR is missing; needed: a new or empty directory, or --dry-run")
        if args.workers < 1 or not 0 < args.file_gb < math.inf:
            raise UserError("--workers must be 1 or more, --file-gb a number more than 0")
        out_dir = expanded(args.out_dir)
        with ByteBar(f"{args.hf_dir} -> {out_dir}", console) as bar:
            how = How(args.workers, int(args.file_gb * 1e9), args.allow_pickle, bar.begin, bar.wrote)
            hf_to_megatron(args.hf_dir, out_dir, how)
        console.print(f"{out_dir} is written")
        return 0

    return stoppable(convert, afterwards="; the same command goes on where it was")


if __name__ == "__main__":
    sys.exit(main())
