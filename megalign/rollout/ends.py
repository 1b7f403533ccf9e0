"""Checks the end-of-sequence tokens of the tokenizer and of the generation settings before any model is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalign.convert.hf.config_json import read_json
from megalign.schema import UserError, shorten

NO_END = "the tokenizer has no end-of-sequence token; sampling needs one to know where a response ends"


def check_ends(hf_dir: Path, tokenizer: Any, *, vocab_size: int) -> None:
    """Refuse end-of-sequence tokens that are outside the model's vocabulary, and models that have none at all.

    They come from the tokenizer and from generation_config.json, or config.json where there is no such file.
    """
    path = hf_dir / "generation_config.json"
    path = path if path.is_file() else hf_dir / "config.json"
    value = read_json(path).get("eos_token_id")
    settings = value if isinstance(value, list) else [] if value is None else [value]
    allowed = f"must be token ids from 0, below {vocab_size}, the model's vocabulary"
    if any(type(token) is not int or not 0 <= token < vocab_size for token in settings):
        raise UserError(f"{path}: eos_token_id is {shorten(value)}; {allowed}")
    own = tokenizer.eos_token_id
    if own is not None and own >= vocab_size:
        raise UserError(f"{hf_dir}: the tokenizer's end-of-sequence token {tokenizer.eos_token!r} is {own}; {allowed}")
    if own is None and not settings:
        raise UserError(NO_END)
