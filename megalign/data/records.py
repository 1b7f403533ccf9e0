"""Check the fields of a record before it is tokenised.

A record's field names follow the TRL dataset formats:
    messages            {"messages": [...]}
    prompt_completion   {"prompt", "completion"}
    preference          {"prompt", "chosen", "rejected"}, or message lists with a shared beginning and no prompt
    responses           {"prompt", "responses": [{"text", "reward", "logp"}]}
with `prompt_ids`, `response_ids`, `chosen_ids`, `rejected_ids` in place of any text, and `teacher_scores` and `weak`.
A sampler adds its `temperature` and which responses are `finished`; fields for human readers (`prompt_text`,
`response_text`, the prompt's own `record`) are never trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from megalign.data.hints import advice
from megalign.data.messages import (
    MESSAGE_FIELDS,
    check_answers,
    check_context,
    check_conversation,
    check_messages,
    check_unicode,
)
from megalign.data.refusals import MISSING, BadRecord, bad_field, run_all

__all__ = ["BadRecord", "check_message_fields", "check_record", "check_slot", "detect_format", "bad_field"]

ANY_FORMAT = ("teacher_scores", "weak", "temperature", "tools", "chat_template_kwargs")
FOR_PEOPLE = ("prompt_text", "record")
# format -> required fields: name of the text field, name of the token id field (None: text only).
SLOTS: dict[str, tuple[tuple[str, str | None], ...]] = {
    "messages": (("messages", None),),
    "prompt_completion": (("prompt", "prompt_ids"), ("completion", "response_ids")),
    "preference": (("prompt", "prompt_ids"), ("chosen", "chosen_ids"), ("rejected", "rejected_ids")),
    "responses": (("prompt", "prompt_ids"), ("responses", None)),
}


def detect_format(record: Mapping[str, Any]) -> str:
    """Return the format whose fields the record has; raise `BadRecord` for no format or two."""
    matches = []
    for name, slots in SLOTS.items():
        marks = {form for slot in slots for form in slot if form} - {"prompt", "prompt_ids"}
        matches += [(name, mark) for mark in sorted(marks & record.keys())]
    if not matches:
        allowed = "messages, prompt with completion, prompt with chosen and rejected, or prompt with responses"
        strangers = sorted(map(str, record.keys() - {"prompt", "prompt_ids", *ANY_FORMAT}))
        problem = f"{_not_known(strangers)}, and" if strangers else "field completion is missing, and"
        missing = [name for name in ("prompt", "completion", "chosen", "rejected", "messages") if name not in record]
        message = f"{problem} no other field holds the text to train on; must be {allowed}"
        message += advice(record, missing=missing, unknown=strangers)
        raise BadRecord("unknown format", message, kinds={f"unknown format: {strangers}"})
    if len({name for name, _ in matches}) > 1:
        fields = " and ".join(mark for _, mark in matches)
        message = f"field {matches[-1][1]}: {fields} belong to different formats; must be one, or set data.format"
        raise BadRecord("unknown format", message, kinds={f"two formats: {fields}"})
    return matches[0][0]


def check_record(
    record: Mapping[str, Any],
    *,
    format: str = "auto",
    extra_fields: str = "error",
    template_words: frozenset[str] = frozenset(),
) -> str:
    """Return the record's format, or raise one `BadRecord` with all its faults.

    template_words: words of the chat template; messages may have fields of these names.
    """
    name = detect_format(record) if format == "auto" else format
    message_fields = MESSAGE_FIELDS | template_words if extra_fields == "error" else None
    run_all(_checks(record, name, message_fields=message_fields))
    return name


def _checks(
    record: Mapping[str, Any], name: str, *, message_fields: frozenset[str] | None
) -> Iterator[Callable[[], None]]:
    """Yield the checks of a record of format `name`; each raises `BadRecord` for the first fault in its own part.

    message_fields: fields that a message may have; None: unknown fields are allowed everywhere.
    """
    strict = message_fields is not None
    known = {form for slot in SLOTS[name] for form in slot if form} | set(ANY_FORMAT)
    known |= set(FOR_PEOPLE) if name == "responses" else set()
    implicit = name == "preference" and not {"prompt", "prompt_ids"} & record.keys()
    implicit = implicit and all(isinstance(record.get(side), list) for side in ("chosen", "rejected"))
    if strict:
        yield partial(_check_known, "", record, known, slots=SLOTS[name][1:] if implicit else SLOTS[name])
    for text, ids in SLOTS[name]:
        if not implicit:
            yield partial(check_slot, record, text, ids, strict=strict, is_prompt=text == "prompt")
        elif text != "prompt":
            yield partial(_check_implicit, text, record[text])
    responses = record.get("responses") if name == "responses" else None
    for index, response in enumerate(responses if isinstance(responses, list) else []):
        yield partial(_check_response, f"responses[{index}]", response, strict=strict)
    if message_fields is not None:
        yield partial(check_message_fields, _texts(record, name), message_fields)
    yield partial(check_context, record)
    yield partial(_check_temperature, record)
    yield partial(_check_teacher_scores, record.get("teacher_scores", {}))
    yield partial(_check_pins, record.get("weak", []))


def _texts(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return {field: value} of all fields of a record that may hold messages."""
    texts = {text: record.get(text) for text, _ in SLOTS[name] if text != "responses"}
    if name == "responses" and isinstance(record.get("responses"), list):
        entries = [entry for entry in record["responses"] if isinstance(entry, dict)]
        texts |= {f"responses[{index}].text": entry.get("text") for index, entry in enumerate(entries)}
    return texts


def check_message_fields(texts: Mapping[str, Any], known: frozenset[str]) -> None:
    """Refuse message fields that neither this code nor the chat template reads."""
    for field, turns in texts.items():
        for index, turn in enumerate(turns if isinstance(turns, list) else []):
            names = [name for name in turn if name not in known] if isinstance(turn, dict) else []
            strangers = [f"{field}[{index}].{name}" for name in names if turn[name] is not None]
            if strangers:
                message = f"{_not_known(strangers)}; must be one of {', '.join(sorted(MESSAGE_FIELDS))}, "
                message += "or a field that the chat template reads (or data.extra_fields: ignore)"
                raise BadRecord("unknown field", message, field=strangers[0])


def _check_implicit(side: str, messages: Any) -> None:
    """Check chosen or rejected as a whole conversation, without a prompt field."""
    check_messages(side, messages)
    check_answers(side, messages, first=len(messages) - 1)


def _check_known(
    prefix: str, record: Mapping[str, Any], known: set[str], *, slots: tuple[tuple[str, str | None], ...] = ()
) -> None:
    strangers = [name for name, value in record.items() if name not in known and value is not None]
    if strangers:
        missing = [text for text, ids in slots if text not in record and ids not in record]
        fields = ", ".join(sorted(known))
        message = f"{_not_known([prefix + str(name) for name in strangers])}; must be one of {fields} "
        message += f"(or data.extra_fields: ignore){advice(record, missing=missing, unknown=strangers)}"
        raise BadRecord("unknown field", message, field=f"{prefix}{' '.join(map(str, strangers))}")


def _not_known(names: Sequence[str]) -> str:
    """Return text on which fields are not known, naming at most six of them."""
    names = [name or "''" for name in names]
    more = f" and {len(names) - 6} more" if names[6:] else ""
    return f"field {names[0]} is not known" if len(names) == 1 else f"fields {', '.join(names[:6])}{more} are not known"


def check_slot(record: Mapping[str, Any], text: str, ids: str | None, *, strict: bool, is_prompt: bool) -> None:
    """Refuse a field that is missing, empty or malformed, or given both as text and as ids."""
    if ids in record:
        if text in record:
            raise BadRecord("text and ids", f"fields {text} and {ids} are both given; must be only one of them")
        check_ids(ids or "", record[ids or ""])
    elif text not in record:
        hint = "" if strict else advice(record, missing=[text], unknown=list(record))
        raise bad_field(text, MISSING, (f"{text} or {ids}" if ids else text) + hint, reason="missing field")
    elif text == "responses":
        if not isinstance(record[text], list) or not record[text]:
            raise bad_field(text, record[text], "a list of one or more objects", reason="responses")
    elif text == "messages":
        check_messages(text, record[text])
        check_conversation(record[text])
    else:
        check_text(text, record[text], is_prompt=is_prompt)


def check_ids(field: str, ids: Any) -> None:
    """Refuse a value that is not a non-empty list of integers >= 0; the vocabulary's size is checked later."""
    if not isinstance(ids, list):
        raise bad_field(field, ids, "a list of token ids", reason="token ids")
    if not ids:
        raise bad_field(
            field, ids, "one or more token ids", reason="empty prompt" if "prompt" in field else "empty response"
        )
    for index, token in enumerate(ids):
        if type(token) is not int or token < 0:
            raise bad_field(f"{field}[{index}]", token, "an integer >= 0", reason="token ids")


def check_text(field: str, value: Any, *, is_prompt: bool) -> None:
    """Refuse a value that is no non-empty string or list of messages; responses begin and end with the assistant."""
    if not isinstance(value, (str, list)):
        raise bad_field(field, value, "a string or a list of messages", reason="wrong type")
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        several = "" if is_prompt else '; several answers are written "responses": [{"text": ..., "reward": ...}, ...]'
        raise bad_field(field, value, f"a string or a list of messages{several}", reason="wrong type")
    if not value:
        reason = "empty prompt" if is_prompt else "empty response"
        raise bad_field(field, value, "a string or list that is not empty", reason=reason)
    if isinstance(value, str):
        check_unicode(field, value)
        return
    check_messages(field, value)
    if not is_prompt:
        check_answers(field, value)


def _check_response(where: str, response: Any, *, strict: bool) -> None:
    if not isinstance(response, dict):
        raise bad_field(where, response, '{"text": ..., "reward": ...}', reason="responses")
    if strict:
        _check_known(f"{where}.", response, {"text", "response_ids", "reward", "logp", "finished", "response_text"})
    if "response_ids" in response:
        if "text" in response:
            raise BadRecord("text and ids", f"fields {where}.text and {where}.response_ids are both given; must be one")
        check_ids(f"{where}.response_ids", response["response_ids"])
    elif "text" in response:
        check_text(f"{where}.text", response["text"], is_prompt=False)
    else:
        raise bad_field(f"{where}.text", MISSING, "text or response_ids", reason="missing field")
    if "reward" in response and not is_number(response["reward"]):
        raise bad_field(f"{where}.reward", response["reward"], "a finite number", reason="reward")
    _check_logp(f"{where}.logp", response.get("logp", []))
    if not isinstance(response.get("finished", True), bool):
        raise bad_field(f"{where}.finished", response["finished"], "true or false", reason="finished")


def _check_logp(field: str, values: Any) -> None:
    if not isinstance(values, list):
        raise bad_field(field, values, "a list of log-probabilities", reason="logp")
    for index, value in enumerate(values):
        if not is_number(value) or value > 0:
            raise bad_field(f"{field}[{index}]", value, "a finite number <= 0", reason="logp")


def _check_temperature(record: Mapping[str, Any]) -> None:
    if "temperature" in record and not (is_number(record["temperature"]) and record["temperature"] > 0):
        raise bad_field("temperature", record["temperature"], "a number above 0, the sampler's", reason="temperature")


def _check_teacher_scores(scores: Any) -> None:
    if not isinstance(scores, dict):
        raise bad_field("teacher_scores", scores, "{name: mean log-probability}", reason="teacher_scores")
    for name, score in scores.items():
        if not is_number(score) or score > 0:
            raise bad_field(f"teacher_scores.{name}", score, "a finite number <= 0", reason="teacher_scores")


def _check_pins(pins: Any) -> None:
    if not isinstance(pins, list):
        raise bad_field("weak", pins, "a list of [record, response]", reason="weak")
    for index, pin in enumerate(pins):
        good = isinstance(pin, list) and len(pin) == 2 and all(type(part) is int and part >= 0 for part in pin)
        if not good:
            raise bad_field(f"weak[{index}]", pin, "[record, response], both from 0", reason="weak")


def is_number(value: Any) -> bool:
    """Return whether value is a finite int or float, not bool. The comparison is False for NaN and huge integers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e308 <= value <= 1e308
