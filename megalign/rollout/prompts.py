"""Prompts of the rounds: records with `prompt` (text or messages) or `prompt_ids`; other fields are the reward's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megalign.data import dataset
from megalign.data.order import Span, step_items
from megalign.data.reading import read_raw
from megalign.data.tokenize import DEFAULT, TextOptions
from megalign.rollout.rewards import Reward
from megalign.schema import UserError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its tokens, and its text and record for the reward. `where` is `path:line`."""

    where: str
    ids: tuple[int, ...]
    text: str
    record: Mapping[str, Any]


def load_prompts(
    path: str,
    tokenizer: Any,
    *,
    reward: Reward,
    vocab_size: int,
    max_length: int,
    options: TextOptions = DEFAULT,
    extra_fields: str = "error",
) -> list[Prompt]:
    """Every prompt in file order; the first one that is wrong stops the job with its line and field.

    max_length: of the prompt, in tokens; what `data.max_length` leaves when the response has its room.
    """
    if tokenizer is None:
        raise UserError("model.path has no tokenizer: rounds need one, because rewards read text")
    groups = dataset.load_prompts(
        path,
        tokenizer,
        max_length=max_length,
        vocab_size=vocab_size,
        options=options,
        extra_fields=extra_fields,
    )
    prompts = []
    for group, raw in zip(groups, read_raw(path, field="rollout.path"), strict=True):
        reward.check_record(group.raw, raw.origin)
        text = group.raw.get("prompt")
        if not isinstance(text, str):
            text = plain_text(tokenizer, group.prompt_ids)
        prompts.append(Prompt(raw.origin, group.prompt_ids, text, group.raw))
    return prompts


def plain_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The tokens' text without special tokens and without any tidying of blanks."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def round_prompts(prompts: Sequence[Prompt], *, seed: int, round_number: int, prompts_per_round: int) -> list[Prompt]:
    """The prompts of a round (from 0): the next ones of an endless stream of the epochs' permutations."""
    items = step_items(round_number, [Span(len(prompts))], groups_per_step=prompts_per_round, seed=seed, shuffle=True)
    return [prompts[index] for _, index in items]
