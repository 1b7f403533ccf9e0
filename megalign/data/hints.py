"""Suggest what to write instead of other programs' fields, for errors about unknown fields."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

SAMPLES = '{"prompt": ..., "responses": [{"text": ..., "reward": ...}, ...]}'
PAIR = '{"prompt": ..., "chosen": ..., "rejected": ...}'
SINGLE = '{"prompt": ..., "completion": ...}'
# (fields that the record must all have, suggestion); the first match is used.
SENTENCES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("completions", "labels"), f"several answers to a prompt are written {SAMPLES}"),
    (("completions",), f"several answers to a prompt are written {SAMPLES}"),
    (("responses", "rewards"), f"rewards are written beside their answers: {SAMPLES}"),
    (("responses", "scores"), f"rewards are written beside their answers: {SAMPLES}"),
    (("completion", "label"), f"labels become rewards of one prompt's answers, {SAMPLES}, or pairs, {PAIR}"),
    (("response_a", "response_b"), f"the better and the worse answer are written {PAIR}"),
    (("response_0", "response_1"), f"the better and the worse answer are written {PAIR}"),
    (("response_j", "response_k"), f"the better and the worse answer are written {PAIR}"),
    (("input_ids",), 'tokens are written {"prompt_ids": [...], "response_ids": [...]}'),
    (("text",), f"a text is split into the given part and the part that is trained on: {SINGLE}"),
    (("messages",), 'the messages before the answer are the prompt: {"prompt": [...]}'),
    (("data",), "the records under data are written one a line, or as a list"),
)
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "query", "instruction", "input", "problem", "inputs", "source"),
    "completion": ("answer", "response", "output", "solution", "target", "outputs", "generation"),
    "chosen": ("preferred", "preferred_output", "accepted", "winner", "chosen_response", "positive"),
    "rejected": ("dispreferred", "non_preferred_output", "loser", "rejected_response", "negative"),
    "messages": ("conversations", "conversation", "dialog", "dialogue", "chat", "turns"),
}


def advice(record: Mapping[str, Any], *, missing: Collection[str], unknown: Collection[str]) -> str:
    """Return "; ..." with what to rename or write, for the end of an error line; empty if nothing fits.

    missing: required fields that the record lacks, in order; unknown: its fields that are not known.
    """
    for fields, sentence in SENTENCES:
        if all(field in record for field in fields) and set(fields) & set(unknown):
            return f"; {sentence}"
    renamed = []
    for name in missing:
        alias = next((alias for alias in ALIASES.get(name, ()) if alias in unknown), None)
        if alias is not None:
            renamed.append(f"{alias} to {name}")
    return f"; rename {' and '.join(renamed)}" if renamed else ""
