"""Raw records from JSONL files and `datasets` directories, and the check of everything tokens need not be known for.

A record's field names follow the TRL dataset formats:
    messages            {"messages": [...]}
    prompt_completion   {"prompt", "completion"}
    preference          {"prompt", "chosen", "rejected"}, or message lists that begin alike and no prompt
    responses           {"prompt", "responses": [{"text", "reward", "logp"}]}
with `prompt_ids`, `response_ids`, `chosen_ids`, `rejected_ids` in place of any text, and `teacher_scores` and `weak`.
A sampler says its `temperature` and which responses are `finished`; what it writes for people alone (`prompt_text`,
`response_text`, the prompt's own `record`) is never trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalign.schema import UserError, shorten

ROLES = ("system", "developer", "user", "assistant", "tool")
ANY_FORMAT = ("teacher_scores", "weak", "temperature")
FOR_PEOPLE = ("prompt_text", "record")
# Of each format: what must be there, as text and as ids (None: there is no such form).
SLOTS: dict[str, tuple[tuple[str, str | None], ...]] = {
    "messages": (("messages", None),),
    "prompt_completion": (("prompt", "prompt_ids"), ("completion", "response_ids")),
    "preference": (("prompt", "prompt_ids"), ("chosen", "chosen_ids"), ("rejected", "rejected_ids")),
    "responses": (("prompt", "prompt_ids"), ("responses", None)),
}


class BadRecord(Exception):
    """One record is refused; `reason` is what a report counts it under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def refuse(field: str, value: Any, allowed: str, *, reason: str) -> BadRecord:
    """The one shape of such messages: field, the value that came, what is allowed."""
    shown = "missing" if value is MISSING else shorten(value)
    return BadRecord(reason, f"field {field} is {shown}; allowed: {allowed}")


MISSING = object()


@dataclass(frozen=True, slots=True)
class RawRecord:
    """A line of a file or a row of a directory, not yet looked at. `origin` is `path:line` or `path:row`."""

    origin: str
    content: bytes | Mapping[str, Any]

    def fields(self) -> dict[str, Any]:
        """The record as a dict; a line that is not a JSON object is a bad record."""
        if not isinstance(self.content, bytes):
            return dict(self.content)
        try:
            value = json.loads(self.content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise BadRecord(
                "invalid JSON", f"the line is not valid JSON ({error}); allowed: one object a line"
            ) from None
        if not isinstance(value, dict):
            raise BadRecord("invalid JSON", f"the line is a {type(value).__name__}; allowed: one object a line")
        return value


def read_raw(path: str, *, field: str = "data.path") -> Iterator[RawRecord]:
    """Records of a JSONL file (line from 1; blank lines are none) or a `datasets` directory (row from 0)."""
    allowed = "allowed: a JSONL file or a directory written by datasets' save_to_disk"
    if not Path(path).exists():
        raise UserError(f"{field} is {path!r}: no such file or directory; {allowed}")
    if Path(path).is_dir():
        yield from _read_directory(path, field=field, allowed=allowed)
        return
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.strip():
                    yield RawRecord(f"{path}:{number}", text)
    except OSError as error:
        raise UserError(f"{field} is {path!r}: {error.strerror}; {allowed}") from None


def _read_directory(path: str, *, field: str, allowed: str) -> Iterator[RawRecord]:
    import datasets  # heavy, and needed for directories alone

    try:
        rows = datasets.load_from_disk(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{field} is {path!r}: {str(error).splitlines()[0]}; {allowed}") from None
    if isinstance(rows, datasets.DatasetDict):
        raise UserError(f"{field} is {path!r}, which holds splits; allowed: one of its folders {sorted(rows)}")
    for number, row in enumerate(rows.with_format(None)):
        yield RawRecord(f"{path}:{number}", _without_nulls(row))


def _without_nulls(value: Any) -> Any:
    """Arrow gives every row every field; null is its way to say that the record has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def detect_format(record: Mapping[str, Any]) -> str:
    """The format whose fields the record has; fields of two formats are a bad record."""
    found = []
    for name, slots in SLOTS.items():
        marks = {form for slot in slots for form in slot if form} - {"prompt", "prompt_ids"}
        found += [(name, mark) for mark in sorted(marks & record.keys())]
    if not found:
        allowed = "messages, prompt with completion, prompt with chosen and rejected, or prompt with responses"
        strangers = sorted(record.keys() - {"prompt", "prompt_ids", *ANY_FORMAT})
        problem = f"field {strangers[0]} is not known" if strangers else "field completion is missing"
        raise BadRecord("unknown format", f"{problem}, and no other field says what is trained on; allowed: {allowed}")
    if len({name for name, _ in found}) > 1:
        fields = " and ".join(mark for _, mark in found)
        raise BadRecord(
            "unknown format", f"field {found[-1][1]}: {fields} belong to different formats; set data.format"
        )
    return found[0][0]


def check_record(record: Mapping[str, Any], *, format: str = "auto", extra_fields: str = "error") -> str:
    """Return the record's format, or raise `BadRecord` for the first thing wrong with it."""
    name = detect_format(record) if format == "auto" else format
    known = {form for slot in SLOTS[name] for form in slot if form} | set(ANY_FORMAT)
    known |= set(FOR_PEOPLE) if name == "responses" else set()
    strict = extra_fields == "error"
    if strict:
        _check_known("", record, known)
    implicit = name == "preference" and not {"prompt", "prompt_ids"} & record.keys()
    implicit = implicit and all(isinstance(record.get(side), list) for side in ("chosen", "rejected"))
    for text, ids in SLOTS[name]:
        if not implicit:
            check_slot(record, text, ids, strict=strict, is_prompt=text == "prompt")
        elif text != "prompt":
            _check_messages(text, record[text], strict=strict)
            _check_answers(text, record[text], first=len(record[text]) - 1)
    for place, response in enumerate(record.get("responses", []) if name == "responses" else []):
        _check_response(f"responses[{place}]", response, strict=strict)
    if "temperature" in record and not (is_number(record["temperature"]) and record["temperature"] > 0):
        raise refuse("temperature", record["temperature"], "a number above 0, the sampler's", reason="temperature")
    _check_teacher_scores(record.get("teacher_scores", {}))
    _check_pins(record.get("weak", []))
    return name


def _check_known(prefix: str, record: Mapping[str, Any], known: set[str]) -> None:
    for name in record:
        if name not in known:
            fields = ", ".join(sorted(known))
            message = f"field {prefix}{name} is not known; allowed: {fields} (or data.extra_fields: ignore)"
            raise BadRecord("unknown field", message)


def check_slot(record: Mapping[str, Any], text: str, ids: str | None, *, strict: bool, is_prompt: bool) -> None:
    """What must be there is there once, as text or as ids, and not empty."""
    if ids in record:
        if text in record:
            raise BadRecord("text and ids", f"fields {text} and {ids} are both there; allowed: one of them")
        check_ids(ids or "", record[ids or ""])
    elif text not in record:
        raise refuse(text, MISSING, f"{text} or {ids}" if ids else text, reason="missing field")
    elif text == "responses":
        if not isinstance(record[text], list) or not record[text]:
            raise refuse(text, record[text], "a list of one or more objects", reason="responses")
    elif text == "messages":
        _check_messages(text, record[text], strict=strict)
        _check_conversation(record[text])
    else:
        check_text(text, record[text], strict=strict, is_prompt=is_prompt)


def check_ids(field: str, ids: Any) -> None:
    """A non-empty list of integers >= 0; the vocabulary's end is checked where it is known."""
    if not isinstance(ids, list):
        raise refuse(field, ids, "a list of token ids", reason="token ids")
    if not ids:
        raise refuse(
            field, ids, "one or more token ids", reason="empty prompt" if "prompt" in field else "empty response"
        )
    for place, token in enumerate(ids):
        if type(token) is not int or token < 0:
            raise refuse(f"{field}[{place}]", token, "an integer >= 0", reason="token ids")


def check_text(field: str, value: Any, *, strict: bool, is_prompt: bool) -> None:
    """A string or a list of messages, with something in it; a response begins and ends with the assistant."""
    if not isinstance(value, (str, list)):
        raise refuse(field, value, "a string or a list of messages", reason="wrong type")
    if not value:
        reason = "empty prompt" if is_prompt else "empty response"
        raise refuse(field, value, "a string or list that is not empty", reason=reason)
    if isinstance(value, str):
        _check_unicode(field, value)
        return
    _check_messages(field, value, strict=strict)
    if not is_prompt:
        _check_answers(field, value)


def _check_unicode(field: str, value: str) -> None:
    """JSON can spell half a surrogate pair, which no tokenizer takes."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise refuse(field, value, "valid Unicode", reason="text") from None


def _check_messages(field: str, value: Any, *, strict: bool) -> None:
    if not isinstance(value, list) or not value:
        raise refuse(field, value, "a list of messages", reason="messages")
    for place, message in enumerate(value):
        where = f"{field}[{place}]"
        if not isinstance(message, dict):
            raise refuse(where, message, '{"role": ..., "content": ...}', reason="messages")
        if message.get("role") not in ROLES:
            raise refuse(f"{where}.role", message.get("role", MISSING), ", ".join(ROLES), reason="messages")
        if not isinstance(message.get("content"), str):
            raise refuse(f"{where}.content", message.get("content", MISSING), "a string", reason="messages")
        _check_unicode(f"{where}.content", message["content"])
        if strict:
            _check_known(f"{where}.", message, {"role", "content"})


def _check_answers(field: str, messages: list[dict[str, str]], *, first: int = 0) -> None:
    """What is trained on (from message `first`) is the assistant's at both ends."""
    for place in (first, len(messages) - 1):
        if messages[place]["role"] != "assistant":
            raise refuse(f"{field}[{place}].role", messages[place]["role"], "assistant", reason="messages")


def _check_conversation(messages: list[dict[str, str]]) -> None:
    if messages[0]["role"] == "assistant":
        raise refuse("messages[0].role", "assistant", "system or user before the first answer", reason="messages")
    _check_answers("messages", messages, first=len(messages) - 1)


def _check_response(where: str, response: Any, *, strict: bool) -> None:
    if not isinstance(response, dict):
        raise refuse(where, response, '{"text": ..., "reward": ...}', reason="responses")
    if strict:
        _check_known(f"{where}.", response, {"text", "response_ids", "reward", "logp", "finished", "response_text"})
    if "response_ids" in response:
        if "text" in response:
            raise BadRecord(
                "text and ids", f"fields {where}.text and {where}.response_ids are both there; allowed: one"
            )
        check_ids(f"{where}.response_ids", response["response_ids"])
    elif "text" in response:
        check_text(f"{where}.text", response["text"], strict=strict, is_prompt=False)
    else:
        raise refuse(f"{where}.text", MISSING, "text or response_ids", reason="missing field")
    if "reward" in response and not is_number(response["reward"]):
        raise refuse(f"{where}.reward", response["reward"], "a finite number", reason="reward")
    _check_logp(f"{where}.logp", response.get("logp", []))
    if not isinstance(response.get("finished", True), bool):
        raise refuse(f"{where}.finished", response["finished"], "true or false", reason="finished")


def _check_logp(field: str, values: Any) -> None:
    if not isinstance(values, list):
        raise refuse(field, values, "a list of log-probabilities", reason="logp")
    for place, value in enumerate(values):
        if not is_number(value) or value > 0:
            raise refuse(f"{field}[{place}]", value, "a finite number <= 0", reason="logp")


def _check_teacher_scores(scores: Any) -> None:
    if not isinstance(scores, dict):
        raise refuse("teacher_scores", scores, "{name: mean log-probability}", reason="teacher_scores")
    for name, score in scores.items():
        if not is_number(score) or score > 0:
            raise refuse(f"teacher_scores.{name}", score, "a finite number <= 0", reason="teacher_scores")


def _check_pins(pins: Any) -> None:
    if not isinstance(pins, list):
        raise refuse("weak", pins, "a list of [record, response]", reason="weak")
    for place, pin in enumerate(pins):
        good = isinstance(pin, list) and len(pin) == 2 and all(type(part) is int and part >= 0 for part in pin)
        if not good:
            raise refuse(f"weak[{place}]", pin, "[record, response], both from 0", reason="weak")


def is_number(value: Any) -> bool:
    """A finite int or float; bool is neither. The comparison refuses NaN and integers no float can hold, too."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e308 <= value <= 1e308
