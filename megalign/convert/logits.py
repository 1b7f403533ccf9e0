"""Compares the logits of Hugging Face checkpoints, as transformers computes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalign.schema import UserError

LONGEST_REASON = 300  # characters of transformers' error message


@dataclass(frozen=True, slots=True)
class LogitGap:
    """Distance of logits B from logits A over all positions and vocabulary entries, relative to A's largest logit."""

    max_abs: float
    max_relative: float
    same_top1: float
    mean_kl: float

    def within(self, tolerance: float) -> bool:
        """Whether the largest difference is at most `tolerance` times the scale; false for NaN."""
        return self.max_relative <= tolerance


def logit_gap(a_TV: Tensor, b_TV: Tensor) -> LogitGap:
    """Compare logits in float64; mean_kl is KL(A || B), averaged over tokens."""
    a_TV, b_TV = a_TV.double(), b_TV.double()
    logp_TV, other_TV = a_TV.log_softmax(-1), b_TV.log_softmax(-1)
    max_abs = (a_TV - b_TV).abs().max().item()
    scale = a_TV.abs().max().item()
    return LogitGap(
        max_abs=max_abs,
        max_relative=0.0 if max_abs == 0 else max_abs / scale if scale > 0 else math.inf,
        same_top1=(a_TV.argmax(-1) == b_TV.argmax(-1)).double().mean().item(),
        mean_kl=(logp_TV.exp() * (logp_TV - other_TV)).sum(-1).mean().item(),
    )


def compute_logits(folder: Path, prompts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Compute logits [T, V] over the tokens of all prompts; UserError where a weight does not load."""
    transformers = _transformers()
    with _loading(f"{folder} does not load"):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    # transformers fills missing weights with random numbers and only warns.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            names = ", ".join(map(str, sorted(report[kind])[:3]))
            raise UserError(f"{folder}: {kind.replace('_', ' ')}: {names}; must be a whole checkpoint")
    limit = model.config.max_position_embeddings
    longest = max(len(prompt) for prompt in prompts)
    if longest > limit:
        raise UserError(f"{folder}: a prompt has {longest} tokens; max_position_embeddings is {limit}")
    with torch.inference_mode():
        return torch.cat([model.eval()(prompt[None]).logits[0] for prompt in prompts])


def read_vocab_size(folder: Path) -> int:
    """Read a checkpoint's `vocab_size` through transformers."""
    transformers = _transformers()
    with _loading(f"{folder / 'config.json'} does not load"):
        return int(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).vocab_size)


def random_prompts(vocab_size: int, *, count: int, num_tokens: int, seed: int) -> list[Tensor]:
    """Draw `count` prompts of uniformly random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(vocab_size, (count, num_tokens), generator=generator))


def text_prompts(folder: Path, text: Path, *, count: int, num_tokens: int) -> list[Tensor]:
    """Tokenise the first non-empty lines of a text file with a checkpoint's tokenizer, up to `num_tokens` each."""
    try:
        lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text is {text}: {error}; must be a text file in UTF-8") from None
    with _loading(f"{folder}: the tokenizer does not load"):
        tokenizer = _transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    prompts = [torch.tensor(tokenizer(line)["input_ids"][:num_tokens]) for line in lines[:count]]
    prompts = [prompt.long() for prompt in prompts if len(prompt)]
    if not prompts:
        raise UserError(f"--text is {text}; must be a file with text: it gives no tokens")
    return prompts


def _transformers() -> Any:
    import transformers  # takes seconds, and other users of this module do not need it

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@contextmanager
def _loading(failure: str) -> Iterator[None]:
    """Turn any exception of transformers into a UserError; its usual cause is a wrong checkpoint directory."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{failure}: {' '.join(str(error).split())[:LONGEST_REASON]}") from None
