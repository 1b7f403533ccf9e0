"""Runs the command export: converts a checkpoint of a run to a Hugging Face checkpoint.

Run: python -m megalign export CKPT_DIR OUT_HF_DIR      (or python tools/megatron_to_hf.py CKPT_DIR OUT_HF_DIR)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megalign.commands.conversion import AFTERWARDS, add_target, print_map, write_target
from megalign.runtime.command_line import ToolParser, expanded, program
from megalign.runtime.status import stoppable

HELP = """Convert a checkpoint of a run or a conversion to a Hugging Face checkpoint. Needs no GPU.

    {prog} CKPT_DIR OUT_HF_DIR

CKPT_DIR is for example RUN_DIR/checkpoints/step_00000100; RUN_DIR and RUN_DIR/checkpoints/latest mean the newest whole
one of the run; the available steps are listed, and damaged ones that are passed over are named. After an interruption,
the same command continues. Exit code: 0 done, 2 wrong input, 75 stopped by a signal.
"""
SIZE = "--shard-gb"
DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit code; prog: how it was called."""
    prog = prog or f"{program()} export"
    parser = ToolParser(HELP.format(prog=prog), prog=prog)
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory")
    add_target(parser, SIZE)
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the written tensors (as stored)")
    args = parser.parse_intermixed_args(arguments)  # options may stand between the directories

    def export() -> int:
        # Imported here: it takes two seconds, which --help and a wrong command line should not wait for.
        import torch

        from megalign.convert.megatron.checkpoint_dir import other_steps
        from megalign.convert.report import tensor_map_back
        from megalign.convert.transfer import megatron_to_hf
        from megalign.train.resume_point import whole_checkpoint

        named = expanded(args.checkpoint)
        found = whole_checkpoint(named)
        checkpoint = found.folder or named
        if checkpoint != named:
            whole = "whole one " if found.problems else ""
            taken = f"{checkpoint}, the newest {whole}of {', '.join(other_steps(checkpoint))}"
            for line in (*found.notes(), taken):
                Console(stderr=True).print(line, soft_wrap=True, highlight=False)
        if args.dry_run:
            print_map(tensor_map_back(checkpoint))
            return 0
        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        return write_target(
            args,
            source=checkpoint,
            name="OUT_HF_DIR",
            size_option=SIZE,
            write=lambda out_dir, options: megatron_to_hf(checkpoint, out_dir, options, dtype=dtype),
        )

    return stoppable(export, afterwards=AFTERWARDS)
