"""Makes the quickstart's inputs: a small untrained Llama with a character tokenizer, and two-digit sums.

Run: python launch/quickstart/make.py runs/quickstart
Writes model/ and data/: train.jsonl, noisy.jsonl (some answers wrong), prompts.jsonl and held_out.jsonl.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "0123456789+="
SEED = 0
NUM_DRAWN = 40000  # half are sums; they include nearly all of the 8100 different ones
HELD_OUT_PAIRS = 200  # of two numbers in either order, so some 400 problems
WRONG_SHARE = 0.4  # of the noisy answers


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character."""
    tokens = (*SPECIAL, *CHARACTERS)
    raw = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a model of half a million parameters; twice the usual initial scale makes small layers learn faster."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.04,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,  # set, it would take the gradient of that row from the embedding
    )
    return LlamaForCausalLM(config)


def draw_sums() -> list[dict[str, Any]]:
    """Draw different two-digit sums as records: `prompt`, and the fields reasoning-gym's scorer reads."""
    drawn = reasoning_gym.create_dataset(
        "chain_sum", seed=SEED, size=NUM_DRAWN, min_terms=2, max_terms=2, min_digits=2, max_digits=2
    )
    records = {}
    for problem in drawn:
        expression = problem["metadata"]["expression"]
        if "+" in expression:
            prompt = expression.replace(" ", "") + "="
            metadata = {"source_dataset": "chain_sum", "expression": expression}
            records[prompt] = {"prompt": prompt, "answer": problem["answer"], "metadata": metadata}
    return list(records.values())


def unordered(record: dict[str, Any]) -> tuple[str, ...]:
    """Return the two numbers in sorted order, a key that a + b and b + a share."""
    return tuple(sorted(record["prompt"].rstrip("=").split("+")))


def split(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split into (train, held out); neither order of a held-out pair is in train."""
    chance = random.Random(SEED)
    pairs = sorted({unordered(record) for record in records})
    held = set(chance.sample(pairs, HELD_OUT_PAIRS))
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for record in chance.sample(records, len(records)):
        parts[unordered(record) in held].append(record)
    return parts


def completions(records: list[dict[str, Any]], *, wrong_share: float) -> list[dict[str, str]]:
    """Return SFT records; a wrong answer is the right one of another problem."""
    chance = random.Random(SEED)
    out = []
    for record in records:
        answer = record["answer"]
        if chance.random() < wrong_share:
            while answer == record["answer"]:
                answer = chance.choice(records)["answer"]
        out.append({"prompt": record["prompt"], "completion": answer})
    return out


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write records as JSONL, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main(folder: Path) -> None:
    """Write the model, its tokenizer and the records of every job of the quickstart."""
    disable_progress_bar()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    train, held_out = split(draw_sums())
    write(folder / "data" / "train.jsonl", completions(train, wrong_share=0))
    write(folder / "data" / "noisy.jsonl", completions(train, wrong_share=WRONG_SHARE))
    write(folder / "data" / "prompts.jsonl", train)
    write(folder / "data" / "held_out.jsonl", held_out)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"a Llama of {parameters} parameters; {len(train)} problems to train on, {len(held_out)} held out")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
