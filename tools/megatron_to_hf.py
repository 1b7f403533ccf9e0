"""Turn a Megatron checkpoint of a run, or of hf_to_megatron.py, into a Hugging Face one. Needs no GPU.

    python tools/megatron_to_hf.py CKPT_DIR OUT_HF_DIR

CKPT_DIR is for example RUN_DIR/checkpoints/step_00000100; RUN_DIR and RUN_DIR/checkpoints/latest stand for the newest
of the run, and the steps that are there are listed. Interrupted, it goes on where it was when started again. Exit
code: 0; 2 for wrong input, 75 stopped by a signal.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from rich.console import Console

from megalign.convert.checkpoint_dir import find_checkpoint_dir, other_steps
from megalign.convert.report import tensor_map_back
from megalign.convert.transfer import How, megatron_to_hf
from megalign.runtime.command_line import ToolParser, expanded
from megalign.runtime.progress import ByteBar
from megalign.runtime.status import stoppable
from megalign.schema import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    parser = ToolParser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory")
    parser.add_argument("out_dir", type=Path, nargs="?", help="new or empty directory")
    parser.add_argument("--dtype", choices=DTYPES, help="of the written tensors (as they are stored)")
    parser.add_argument("--workers", type=int, default=2, help="threads, each of which holds one tensor (2)")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="size of the files, in 10^9 bytes (5)")
    parser.add_argument("--dry-run", action="store_true", help="check the checkpoint, print the tensor map and stop")
    args = parser.parse_intermixed_args(arguments)  # options may stand between the directories
    console = Console(stderr=True)

    def convert() -> int:
        checkpoint = find_checkpoint_dir(expanded(args.checkpoint))
        if checkpoint != args.checkpoint:
            there = ", ".join(other_steps(checkpoint))
            console.print(f"{checkpoint}, the newest of {there}", soft_wrap=True, highlight=False)
        if args.dry_run:
            Console(width=max(Console().width, 160)).print(tensor_map_back(checkpoint))
            return 0
        if args.out_dir is None:
            raise UserError("OUT_HF_DIR is missing; needed: a new or empty directory, or --dry-run")
        if args.workers < 1 or not 0 < args.shard_gb < math.inf:
            raise UserError("--workers must be 1 or more, --shard-gb a number more than 0")
        out_dir = expanded(args.out_dir)
        with ByteBar(f"{checkpoint} -> {out_dir}", console) as bar:
            how = How(args.workers, int(args.shard_gb * 1e9), begin=bar.begin, wrote=bar.wrote)
            megatron_to_hf(checkpoint, out_dir, how, dtype=DTYPES.get(args.dtype))
        console.print(f"{out_dir} is written")
        return 0

    return stoppable(convert, afterwards="; the same command goes on where it was")


if __name__ == "__main__":
    sys.exit(main())
