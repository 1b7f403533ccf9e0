"""Reads the prompts of rounds: `prompt` (text or messages) or `prompt_ids`; all other fields go to the reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megalign.data.order import Span, step_items
from megalign.data.prompts import load_prompt_groups
from megalign.data.record_counts import RecordCounts
from megalign.data.records import BadRecord
from megalign.data.tokenize import DEFAULT, TextOptions
from megalign.rollout.rewards import Reward
from megalign.schema import UserError


@dataclass(frozen=True, slots=True)
class Prompt:
    """Holds a prompt: its tokens, and the text and record that its reward reads; `where` is `path:line`."""

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
    field: str = "rollout.path",
    options: TextOptions = DEFAULT,
    extra_fields: str = "error",
    on_bad_record: str = "stop",
    report: RecordCounts | None = None,
) -> list[Prompt]:
    """Read every prompt in file order; a bad one stops the job with its line and field, or is skipped.

    max_length: of the prompt, in tokens: `data.max_length` less `rollout.max_new_tokens`. report: filled with the
    counts of kept and skipped records.
    """
    if tokenizer is None:
        raise UserError("model.path has no tokenizer: rounds need one, because rewards read text")

    def check(record: Mapping[str, Any]) -> None:
        problem = reward.problem(record)
        if problem is not None:
            raise BadRecord("field of the reward", problem)

    report = RecordCounts() if report is None else report
    groups = load_prompt_groups(
        path,
        tokenizer,
        max_length=max_length,
        vocab_size=vocab_size,
        field=field,
        options=options,
        extra_fields=extra_fields,
        on_bad_record=on_bad_record,
        check=check,
        report=report,
    )
    prompts = []
    for origin, group in zip(report.origins, groups, strict=True):
        text = group.raw.get("prompt")
        if not isinstance(text, str):
            text = plain_text(tokenizer, group.prompt_ids)
        prompts.append(Prompt(origin, group.prompt_ids, text, group.raw))
    return prompts


def plain_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decode token ids without special tokens, leaving spaces as they are."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def round_prompts(prompts: Sequence[Prompt], *, seed: int, round_number: int, prompts_per_round: int) -> list[Prompt]:
    """Return a round's prompts: the next ones of an endless stream, shuffled anew every epoch; rounds count from 0."""
    items = step_items(round_number, [Span(len(prompts))], groups_per_step=prompts_per_round, seed=seed, shuffle=True)
    return [prompts[index] for _, index in items]
