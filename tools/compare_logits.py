"""Compare the logits of two Hugging Face checkpoints on the same tokens.

    python tools/compare_logits.py A_HF_DIR B_HF_DIR [--tokens 64] [--text FILE] [--dtype float32] [--tolerance 1e-5]

Both are loaded by transformers. Exit code: 0 within the tolerance, 1 not, 2 for wrong input.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megalign.convert import resolve_model
from megalign.runtime.command_line import ToolParser, expanded
from megalign.runtime.status import guarded
from megalign.schema import UserError


@dataclass(frozen=True)
class Difference:
    """Of B from A, over all positions and words; the scale is the largest logit of A."""

    max_abs: float
    max_relative: float
    same_top1: float
    mean_kl: float

    def within(self, tolerance: float) -> bool:
        return self.max_relative <= tolerance  # false for nan


def compare(a_TV: Tensor, b_TV: Tensor) -> Difference:
    """Differences in float64; KL is that of B's distribution from A's, mean over tokens."""
    a_TV, b_TV = a_TV.double(), b_TV.double()
    logp_TV, other_TV = a_TV.log_softmax(-1), b_TV.log_softmax(-1)
    max_abs = (a_TV - b_TV).abs().max().item()
    scale = a_TV.abs().max().item()
    return Difference(
        max_abs=max_abs,
        max_relative=0.0 if max_abs == 0 else max_abs / scale if scale > 0 else math.inf,
        same_top1=(a_TV.argmax(-1) == b_TV.argmax(-1)).double().mean().item(),
        mean_kl=(logp_TV.exp() * (logp_TV - other_TV)).sum(-1).mean().item(),
    )


def compute_logits(folder: Path, prompts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """[T, V] over the tokens of all prompts."""
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (
        Exception
    ) as error:  # whatever transformers raises for a directory that it cannot load, the directory is wrong
        raise UserError(f"{folder} does not load: {' '.join(str(error).split())[:300]}") from None
    # transformers fills what is missing with random numbers and only warns.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise UserError(f"{folder}: {kind.replace('_', ' ')}: {', '.join(map(str, sorted(report[kind])[:3]))}")
    limit = model.config.max_position_embeddings
    longest = max(len(prompt) for prompt in prompts)
    if longest > limit:
        raise UserError(f"{folder}: a prompt has {longest} tokens; max_position_embeddings is {limit}")
    with torch.inference_mode():
        return torch.cat([model.eval()(prompt[None]).logits[0] for prompt in prompts])


def read_vocab_size(folder: Path) -> int:
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).vocab_size
    except Exception as error:  # as above
        raise UserError(f"{folder / 'config.json'} does not load: {' '.join(str(error).split())[:300]}") from None


def random_prompts(vocab_size: int, args: argparse.Namespace) -> list[Tensor]:
    generator = torch.Generator().manual_seed(args.seed)
    return list(torch.randint(vocab_size, (args.prompts, args.tokens), generator=generator))


def text_prompts(folder: Path, args: argparse.Namespace) -> list[Tensor]:
    """The first lines of a text file that are not empty, through A's tokenizer, cut to `--tokens`."""
    try:
        lines = [line for line in expanded(args.text).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text is {args.text}: {error}") from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as above
        raise UserError(f"{folder}: the tokenizer does not load: {' '.join(str(error).split())[:300]}") from None
    prompts = [torch.tensor(tokenizer(line)["input_ids"][: args.tokens]) for line in lines[: args.prompts]]
    prompts = [prompt.long() for prompt in prompts if len(prompt)]
    if not prompts:
        raise UserError(f"--text is {args.text}; it gives no tokens")
    return prompts


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("a_hf_dir", metavar="A_HF_DIR", help="directory or hf://org/name")
    parser.add_argument("b_hf_dir", metavar="B_HF_DIR", help="directory or hf://org/name")
    parser.add_argument("--tokens", type=_at_least_one, default=64, help="tokens a prompt (default 64)")
    parser.add_argument("--prompts", type=_at_least_one, default=4, help="number of prompts (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens")
    parser.add_argument("--text", type=Path, help="take the prompts from the lines of this file instead")
    parser.add_argument("--dtype", choices=["float64", "float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest difference over largest logit")
    return parser.parse_args(arguments)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(text)


def run(args: argparse.Namespace, console: Console) -> bool:
    """Print the table and the verdict; true when the checkpoints agree."""
    folders = [resolve_model(args.a_hf_dir), resolve_model(args.b_hf_dir)]
    sizes = [read_vocab_size(folder) for folder in folders]
    if sizes[0] != sizes[1]:
        raise UserError(f"vocab_size is {sizes[0]} in {folders[0]} and {sizes[1]} in {folders[1]}; it must be the same")
    prompts = text_prompts(folders[0], args) if args.text else random_prompts(sizes[0], args)
    # One model in memory at a time.
    a_TV, b_TV = (compute_logits(folder, prompts, getattr(torch, args.dtype)) for folder in folders)
    difference = compare(a_TV, b_TV)
    table = Table(title=f"{a_TV.shape[0]} tokens, {a_TV.shape[1]} words, {args.dtype}")
    for heading in ("max abs", "max relative to scale", "top-1 agreement", "mean KL"):
        table.add_column(heading, justify="right")
    table.add_row(
        f"{difference.max_abs:.3e}",
        f"{difference.max_relative:.3e}",
        f"{difference.same_top1:.4f}",
        f"{difference.mean_kl:.3e}",
    )
    console.print(table)
    agrees = difference.within(args.tolerance)
    verdict = "EQUAL" if difference.max_abs == 0 else "within tolerance" if agrees else "DIFFERENT"
    console.print(
        f"{verdict}: {difference.max_relative:.3e} relative to the largest logit, tolerance {args.tolerance:g}"
    )
    return agrees


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return guarded(lambda: 0 if run(args, Console()) else 1)


if __name__ == "__main__":
    sys.exit(main())
