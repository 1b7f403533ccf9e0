"""Refuse token ids outside the vocabulary and sequences that are empty or too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megalign.data.group import Group
from megalign.data.refusals import BadRecord, bad_field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_tokens(
    group: Group,
    fields: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    vocab_size: int,
) -> None:
    """Refuse an empty prompt, ids outside the vocabulary and sequences that are too long.

    fields: the record's fields of the prompt, then of each response, for errors.
    """
    if not group.prompt_ids:
        message = f"field {fields[0]} has no tokens; must be at least one, or the first response token has no score"
        raise BadRecord("empty prompt", message)
    texts = [group.prompt_ids, *(response.ids for response in group.responses)]
    for name, ids in zip(fields, texts, strict=True):
        highest, allowed = max(ids), f"token ids below the model's {vocab_size}"
        if highest < vocab_size:
            continue
        if tokenizer is None or name.endswith("_ids"):
            raise bad_field(name, highest, allowed, reason="token ids")
        token = tokenizer.convert_ids_to_tokens(highest)
        message = f"field {name} becomes token id {highest}, the tokenizer's {token!r}; must be {allowed}"
        raise BadRecord("token ids", message, field=name)
    for name, ids in zip(fields[1:] or fields, texts[1:] or [()], strict=True):
        length = len(group.prompt_ids) + len(ids)
        if length > max_length:
            message = f"field {name} is {length} tokens long, prompt included; must be at most {max_length}"
            raise BadRecord("too long", message, size=length)
