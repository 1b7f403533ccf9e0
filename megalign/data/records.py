"""Check everything about a record for which tokens need not be known.

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

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from megalign.data.hints import advice
from megalign.schema import shorten

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
    """One record is refused; `reason` is what a report counts it under, `field` where the fault lies.

    kinds: a name for each fault, the same in every record with that fault; empty for what tokenising finds.
    """

    def __init__(self, reason: str, message: str, *, field: str = "", kinds: Collection[str] = ()) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field
        self.kinds = frozenset(kinds)


def refuse(field: str, value: Any, allowed: str, *, reason: str) -> BadRecord:
    """The one shape of such messages: field, the value that came, what is allowed."""
    shown = "missing" if value is MISSING else shorten(value)
    return BadRecord(reason, f"field {field} is {shown}; allowed: {allowed}", field=field)


def joined(faults: Sequence[BadRecord]) -> BadRecord:
    """One refusal for all the faults of a record; faults of one kind, such as of each response, are told once."""
    by_kind: dict[str, list[BadRecord]] = {}
    for fault in faults:
        by_kind.setdefault(f"{fault.reason}: {re.sub('[0-9]+', '', fault.field)}", []).append(fault)
    more = {kind: f" (and {len(alike) - 1} more like it)" if alike[1:] else "" for kind, alike in by_kind.items()}
    message = "; also: ".join(f"{alike[0]}{more[kind]}" for kind, alike in by_kind.items())
    return BadRecord(faults[0].reason, message, field=faults[0].field, kinds=by_kind)


MISSING = object()


def detect_format(record: Mapping[str, Any]) -> str:
    """The format whose fields the record has; fields of two formats are a bad record."""
    found = []
    for name, slots in SLOTS.items():
        marks = {form for slot in slots for form in slot if form} - {"prompt", "prompt_ids"}
        found += [(name, mark) for mark in sorted(marks & record.keys())]
    if not found:
        allowed = "messages, prompt with completion, prompt with chosen and rejected, or prompt with responses"
        strangers = sorted(map(str, record.keys() - {"prompt", "prompt_ids", *ANY_FORMAT}))
        problem = f"{_not_known(strangers)}, and" if strangers else "field completion is missing, and"
        missing = [name for name in ("prompt", "completion", "chosen", "rejected", "messages") if name not in record]
        message = f"{problem} no other field says what is trained on; allowed: {allowed}"
        message += advice(record, missing=missing, unknown=strangers)
        raise BadRecord("unknown format", message, kinds={f"unknown format: {strangers}"})
    if len({name for name, _ in found}) > 1:
        fields = " and ".join(mark for _, mark in found)
        message = f"field {found[-1][1]}: {fields} belong to different formats; set data.format"
        raise BadRecord("unknown format", message, kinds={f"two formats: {fields}"})
    return found[0][0]


def check_record(record: Mapping[str, Any], *, format: str = "auto", extra_fields: str = "error") -> str:
    """Return the record's format, or raise one `BadRecord` that tells everything wrong with it."""
    name = detect_format(record) if format == "auto" else format
    faults = []
    for check in _checks(record, name, strict=extra_fields == "error"):
        try:
            check()
        except BadRecord as fault:
            faults.append(fault)
    if faults:
        raise joined(faults)
    return name


def _checks(record: Mapping[str, Any], name: str, *, strict: bool) -> Iterator[Callable[[], None]]:
    """What has to hold of a record of format `name`; each raises for the first thing wrong with its own part."""
    known = {form for slot in SLOTS[name] for form in slot if form} | set(ANY_FORMAT)
    known |= set(FOR_PEOPLE) if name == "responses" else set()
    if strict:
        yield partial(_check_known, "", record, known, slots=SLOTS[name])
    implicit = name == "preference" and not {"prompt", "prompt_ids"} & record.keys()
    implicit = implicit and all(isinstance(record.get(side), list) for side in ("chosen", "rejected"))
    for text, ids in SLOTS[name]:
        if not implicit:
            yield partial(check_slot, record, text, ids, strict=strict, is_prompt=text == "prompt")
        elif text != "prompt":
            yield partial(_check_implicit, text, record[text], strict=strict)
    responses = record.get("responses") if name == "responses" else None
    for place, response in enumerate(responses if isinstance(responses, list) else []):
        yield partial(_check_response, f"responses[{place}]", response, strict=strict)
    yield partial(_check_temperature, record.get("temperature", 1))
    yield partial(_check_teacher_scores, record.get("teacher_scores", {}))
    yield partial(_check_pins, record.get("weak", []))


def _check_implicit(side: str, messages: Any, *, strict: bool) -> None:
    """chosen or rejected as a whole conversation, without a prompt field."""
    _check_messages(side, messages, strict=strict)
    _check_answers(side, messages, first=len(messages) - 1)


def _check_known(
    prefix: str, record: Mapping[str, Any], known: set[str], *, slots: tuple[tuple[str, str | None], ...] = ()
) -> None:
    strangers = [name for name in record if name not in known]
    if strangers:
        missing = [text for text, ids in slots if text not in record and ids not in record]
        fields = ", ".join(sorted(known))
        message = f"{_not_known([prefix + str(name) for name in strangers])}; allowed: {fields} "
        message += f"(or data.extra_fields: ignore){advice(record, missing=missing, unknown=strangers)}"
        raise BadRecord("unknown field", message, field=f"{prefix}{' '.join(map(str, strangers))}")


def _not_known(names: Sequence[str]) -> str:
    """Fields nobody knows, at most six of them by name."""
    more = f" and {len(names) - 6} more" if names[6:] else ""
    return f"field {names[0]} is not known" if len(names) == 1 else f"fields {', '.join(names[:6])}{more} are not known"


def check_slot(record: Mapping[str, Any], text: str, ids: str | None, *, strict: bool, is_prompt: bool) -> None:
    """What must be there is there once, as text or as ids, and not empty."""
    if ids in record:
        if text in record:
            raise BadRecord("text and ids", f"fields {text} and {ids} are both there; allowed: one of them")
        check_ids(ids or "", record[ids or ""])
    elif text not in record:
        hint = "" if strict else advice(record, missing=[text], unknown=list(record))
        raise refuse(text, MISSING, (f"{text} or {ids}" if ids else text) + hint, reason="missing field")
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


def _check_temperature(value: Any) -> None:
    if not is_number(value) or value <= 0:
        raise refuse("temperature", value, "a number above 0, the sampler's", reason="temperature")


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
