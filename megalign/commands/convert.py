"""Runs the command convert: converts a Hugging Face checkpoint to a Megatron checkpoint.

Run: python -m megalign convert HF_DIR OUT_DIR      (or python tools/hf_to_megatron.py HF_DIR OUT_DIR)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megalign.commands.conversion import AFTERWARDS, add_target, print_map, write_target
from megalign.runtime.command_line import ToolParser, program
from megalign.runtime.status import stoppable

HELP = """Convert a Hugging Face checkpoint to a Megatron `torch_dist` checkpoint for any layout. Needs no GPU.

    {prog} HF_DIR OUT_DIR
    {prog} HF_DIR --dry-run

HF_DIR may be hf://org/name or hf://org/name@revision. After an interruption, the same command continues. Exit code:
0 done, 2 wrong input, 75 stopped by a signal.
"""
SIZE = "--file-gb"


def main(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit code; prog: how it was called."""
    prog = prog or f"{program()} convert"
    parser = ToolParser(HELP.format(prog=prog), prog=prog)
    parser.add_argument("hf_dir", help="Hugging Face directory, or hf://org/name")
    add_target(parser, SIZE)
    parser.add_argument("--allow-pickle", action="store_true", help="also read pytorch_model.bin, plain tensors only")
    args = parser.parse_intermixed_args(arguments)  # options may stand between the directories

    def convert() -> int:
        # Imported here: it takes two seconds, which --help and a wrong command line should not wait for.
        from megalign.convert.report import tensor_map
        from megalign.convert.transfer import hf_to_megatron

        if args.dry_run:
            print_map(tensor_map(args.hf_dir, allow_pickle=args.allow_pickle))
            return 0
        return write_target(
            args,
            source=args.hf_dir,
            name="OUT_DIR",
            size_option=SIZE,
            write=lambda out_dir, options: hf_to_megatron(
                args.hf_dir, out_dir, replace(options, allow_pickle=args.allow_pickle)
            ),
        )

    return stoppable(convert, afterwards=AFTERWARDS)
