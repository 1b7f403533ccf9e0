"""Load prompts that rounds sample responses to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from megalign.data.chat import template_words
from megalign.data.group import Group
from megalign.data.limits import check_tokens
from megalign.data.messages import MESSAGE_FIELDS, check_context
from megalign.data.reading import read_raw
from megalign.data.record_counts import RecordCounts
from megalign.data.records import BadRecord, check_message_fields, check_slot
from megalign.data.tokenize import DEFAULT, TextOptions, encode_prompt
from megalign.schema import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_prompt_groups(
    path: str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    vocab_size: int,
    field: str = "rollout.path",
    options: TextOptions = DEFAULT,
    extra_fields: str = "error",
    on_bad_record: str = "stop",
    check: Callable[[Mapping[str, Any]], None] = lambda record: None,
    report: RecordCounts | None = None,
) -> list[Group]:
    """Return the prompts of a file as groups without responses; other fields stay in `raw`, for the reward.

    check: raises `BadRecord` for a record that the reward cannot use. report: gets the counts if given.
    """
    known = MESSAGE_FIELDS | template_words(getattr(tokenizer, "chat_template", None))
    groups = []
    report = RecordCounts() if report is None else report
    for raw in read_raw(path, field=field):
        number = report.num_records
        report.num_records += 1
        try:
            record = raw.fields()
            check_slot(record, "prompt", "prompt_ids", strict=False, is_prompt=True)
            check_context(record)
            if extra_fields == "error":
                check_message_fields({"prompt": record.get("prompt")}, known)
            name = "prompt_ids" if "prompt_ids" in record else "prompt"
            notes: Counter[str] = Counter()
            ids = encode_prompt(record, tokenizer, options=options, notes=notes)
            group = Group(number, ids, (), raw=record)
            check_tokens(group, [name], tokenizer, max_length=max_length, vocab_size=vocab_size)
            check(record)
        except BadRecord as bad:
            report.reject(raw.origin, bad, on_bad_record=on_bad_record)
            continue
        except UserError as error:
            raise UserError(f"{raw.origin}: {error}") from None
        groups.append(group)
        report.notes.update(notes)
        report.origins.append(raw.origin)
    report.num_kept = len(groups)
    if not report.num_records:
        raise UserError(f"{field} ({path}) holds no records; must be one or more")
    if not groups:
        raise UserError(f"no record of {field} is usable; the first problem: {report.first_problem()}")
    return groups
