"""Runs the command compare: prints the difference between the logits of two Hugging Face checkpoints.

Run: python -m megalign compare A_HF_DIR B_HF_DIR      (or python tools/compare_logits.py A_HF_DIR B_HF_DIR)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from megalign.runtime.command_line import ToolParser, expanded, program, whole_number
from megalign.runtime.status import stoppable
from megalign.schema import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from megalign.convert.logits import LogitGap

HELP = """Compare the logits of two Hugging Face checkpoints on the same tokens.

    {prog} A_HF_DIR B_HF_DIR [--tokens 64] [--text FILE] [--dtype float32] [--tolerance 1e-5]

Both are loaded by transformers. Exit code: 0 within the tolerance, 1 not, 2 for wrong input, 75 stopped by a signal.
"""


def main(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit code; prog: how it was called."""
    prog = prog or f"{program()} compare"
    parser = ToolParser(HELP.format(prog=prog), prog=prog)
    parser.add_argument("a_hf_dir", metavar="A_HF_DIR", help="directory or hf://org/name")
    parser.add_argument("b_hf_dir", metavar="B_HF_DIR", help="directory or hf://org/name")
    parser.add_argument("--tokens", type=whole_number, default=64, help="tokens a prompt (default 64)")
    parser.add_argument("--prompts", type=whole_number, default=4, help="number of prompts (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random tokens (default 0)")
    parser.add_argument("--text", type=Path, help="take the prompts from the lines of this file instead")
    parser.add_argument("--dtype", choices=["float64", "float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest difference over largest logit")
    args = parser.parse_args(arguments)
    return stoppable(lambda: 0 if _run(args, Console()) else 1)


def _run(args: argparse.Namespace, console: Console) -> bool:
    """Print the table and the verdict; true where the checkpoints agree."""
    # Imported here: it takes two seconds, which --help and a wrong command line should not wait for.
    import torch

    from megalign.convert.hf.reader import resolve_model
    from megalign.convert.logits import compute_logits, logit_gap, read_vocab_size

    folders = [resolve_model(args.a_hf_dir), resolve_model(args.b_hf_dir)]
    sizes = [read_vocab_size(folder) for folder in folders]
    if sizes[0] != sizes[1]:
        raise UserError(f"vocab_size is {sizes[0]} in {folders[0]} and {sizes[1]} in {folders[1]}; must be the same")
    prompts = _prompts(args, folders[0], sizes[0])
    # One model in memory at a time.
    a_TV, b_TV = (compute_logits(folder, prompts, getattr(torch, args.dtype)) for folder in folders)
    gap = logit_gap(a_TV, b_TV)
    console.print(_table(gap, title=f"{a_TV.shape[0]} tokens, {a_TV.shape[1]} vocabulary entries, {args.dtype}"))
    agrees = gap.within(args.tolerance)
    verdict = "EQUAL" if gap.max_abs == 0 else "within tolerance" if agrees else "DIFFERENT"
    console.print(f"{verdict}: {gap.max_relative:.3e} relative to the largest logit, tolerance {args.tolerance:g}")
    return agrees


def _prompts(args: argparse.Namespace, folder: Path, vocab_size: int) -> list[Tensor]:
    from megalign.convert.logits import random_prompts, text_prompts

    if args.text is None:
        return random_prompts(vocab_size, count=args.prompts, num_tokens=args.tokens, seed=args.seed)
    return text_prompts(folder, expanded(args.text), count=args.prompts, num_tokens=args.tokens)


def _table(gap: LogitGap, *, title: str) -> Table:
    table = Table(title=title)
    for heading in ("max abs", "max relative to scale", "top-1 agreement", "mean KL"):
        table.add_column(heading, justify="right")
    table.add_row(f"{gap.max_abs:.3e}", f"{gap.max_relative:.3e}", f"{gap.same_top1:.4f}", f"{gap.mean_kl:.3e}")
    return table
