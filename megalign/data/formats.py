"""Recognise records in other programs' formats and convert them to our own.

    ShareGPT       {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    Alpaca         {"instruction", "input", "output"}: instruction and input are the user's message
    UltraFeedback  a prompt string beside whole conversations in chosen and rejected, or in messages
    OpenAI pairs   {"input": {"messages"}, "preferred_output", "non_preferred_output"}

Only unambiguous records are converted; ambiguous ones are refused with the line to write instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megalign.data.records import BadRecord, bad_field
from megalign.schema import UserError

SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
ROLES = ("system", "user", "assistant", "tool")
SIDES = ("chosen", "rejected")
OURS_ALONE = {"responses", "prompt_ids", "response_ids", "chosen_ids", "rejected_ids"}
TEXTS = ("prompt", "completion", *SIDES, "messages")


@dataclass(frozen=True)
class Reading:
    """Holds a converted record, the name of its original format, and the fields that were left out."""

    record: dict[str, Any]
    name: str = ""  # empty: the record was in one of our own formats
    left_out: tuple[str, ...] = ()

    def summary(self) -> str:
        """Return the name of the format and the fields left out, for the log."""
        return f"{self.name}{', without ' + ', '.join(self.left_out) if self.left_out else ''}"

    def named(self, error: BadRecord | UserError) -> BadRecord | UserError:
        """Return the error with the format's name appended, since the converted record has other field names."""
        if not self.name:
            return error
        message = f"{error} (the record was read as {self.name})"
        if isinstance(error, UserError):
            return UserError(message)
        return BadRecord(error.reason, message, field=error.field, kinds=error.kinds, size=error.size)


def recognise(record: Mapping[str, Any], *, format: str = "auto") -> Reading:
    """Return the record converted to our own fields if its format is known and converts to `format`; else unchanged."""
    if OURS_ALONE & record.keys():
        return Reading(dict(record))
    if format in ("auto", "preference"):
        _refuse_dialogue_strings(record)
    for reader, targets in READERS:
        if format in ("auto", *targets):
            reading = reader(record)
            if reading is not None and format in ("auto", _target(reading.record)):
                return reading
    return Reading(dict(record))


def _target(record: Mapping[str, Any]) -> str:
    if "messages" in record:
        return "messages"
    return "preference" if "chosen" in record else "prompt_completion"


def _left_out(record: Mapping[str, Any], *names: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the named fields that the record has, and the record without them."""
    present = tuple(name for name in names if name in record)
    return present, {name: value for name, value in record.items() if name not in present}


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def _says(value: Any) -> bool:
    """Return whether value is a ShareGPT turn or a list of them: from and value, or ShareGPT's role names."""
    turns = [value] if isinstance(value, Mapping) else value
    return _is_chat(turns) and any(("from" in turn and "value" in turn) or _speaker(turn) for turn in turns)


def _speaker(turn: Mapping[str, Any]) -> str | None:
    role = turn.get("role")
    return SPEAKERS.get(role) if isinstance(role, str) else None


def _sharegpt(record: Mapping[str, Any]) -> Reading | None:
    """Convert `conversations` (or `conversation`), and turns with from and value in any of our own fields."""
    key = next((name for name in ("conversations", "conversation") if name in record), None)
    if not any(_says(record.get(name)) for name in TEXTS) and (key is None or not _is_chat(record[key])):
        return None
    if key is not None and ("messages" in record or "prompt" in record):
        return None
    left_out, rest = _left_out(record, "id", *(["tools"] if record.get("tools") == "" else []))
    for name in TEXTS:
        if _says(rest.get(name)):
            rest[name] = _turns(name, rest[name])
    if key is not None:
        turns = _turns(key, rest.pop(key))
        system = rest.pop("system", None)
        if system:
            turns = [{"role": "system", "content": system}, *turns]
        rest["prompt" if "chosen" in rest and "rejected" in rest else "messages"] = turns
    return Reading(rest, "ShareGPT", left_out)


def _turns(field: str, value: Any) -> list[dict[str, Any]]:
    turns = []
    for index, turn in enumerate([value] if isinstance(value, Mapping) else value):
        if "from" not in turn:
            turns.append({**turn, "role": _speaker(turn)} if _speaker(turn) else dict(turn))
            continue
        speaker = turn["from"]
        role = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
        if role not in ROLES:
            allowed = f"{', '.join(sorted({*SPEAKERS, *ROLES}))}; tool calls must be messages with tool_calls"
            raise bad_field(f"{field}[{index}].from", speaker, allowed, reason="messages")
        rest = {name: inner for name, inner in turn.items() if name not in ("from", "value")}
        turns.append({"role": role, **({"content": turn["value"]} if "value" in turn else {}), **rest})
    return turns


def _alpaca(record: Mapping[str, Any]) -> Reading | None:
    """Convert instruction with output, or with chosen and rejected; system and history as in LLaMA-Factory."""
    answers = ("output",) if "output" in record else SIDES
    if "instruction" not in record or any(name not in record for name in answers):
        return None
    if {"prompt", "completion", "messages", "responses"} & record.keys():
        return None
    left_out, rest = _left_out(record, "id", *(["text"] if _renders(record) else []))
    asked = [rest.pop("instruction"), rest.pop("input", None) or ""]
    said = {name: rest.pop(name) for name in answers}
    for name, text in [("instruction", asked[0]), ("input", asked[1]), *said.items()]:
        if not isinstance(text, str):
            raise bad_field(name, text, "a string", reason="wrong type")
        if not text and name != "input":
            reason = "empty prompt" if name == "instruction" else "empty response"
            raise bad_field(name, text, "a string that is not empty", reason=reason)
    system, history = rest.pop("system", None), rest.pop("history", None) or []
    prompt = [{"role": "system", "content": system}] if system else []
    for index, exchange in enumerate(history):
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise bad_field(f"history[{index}]", exchange, "[user message, answer]", reason="wrong type")
        prompt += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), exchange, strict=True)]
    prompt.append({"role": "user", "content": "\n".join(text for text in asked if text)})
    ours = {"completion" if name == "output" else name: text for name, text in said.items()}
    return Reading({"prompt": prompt, **ours, **rest}, "Alpaca", left_out)


def _renders(record: Mapping[str, Any]) -> bool:
    """Return whether `text` only repeats instruction and output, as in Alpaca's published file."""
    text = record.get("text")
    parts = (record["instruction"], record.get("output"))
    return isinstance(text, str) and all(isinstance(part, str) and part in text for part in parts)


def _ultrafeedback_pair(record: Mapping[str, Any]) -> Reading | None:
    """Convert a prompt with chosen and rejected that are whole conversations beginning with it."""
    chosen, rejected, prompt = (record.get(name) for name in (*SIDES, "prompt"))
    if not (isinstance(chosen, list) and isinstance(rejected, list) and _is_chat(chosen) and _is_chat(rejected)):
        return None
    if prompt is None or _says(chosen):
        return None
    if isinstance(prompt, list):
        whole = bool(prompt) and all(side[: len(prompt)] == prompt for side in (chosen, rejected))
        if not whole or len(prompt) == min(len(chosen), len(rejected)):
            return None
        ours = {side: record[side][len(prompt) :] for side in SIDES}
        return Reading({**record, **ours}, "whole conversations beside their prompt")
    if not isinstance(prompt, str) or all(side[0].get("role") == "assistant" for side in (chosen, rejected)):
        return None
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    asked = [turn.get("content") for turn in chosen[:shared] if turn.get("role") == "user"]
    if prompt not in (asked[:1] + asked[-1:]):
        allowed = "a user message that both chosen and rejected contain, or absent beside whole conversations"
        raise bad_field("prompt", prompt, allowed, reason="implicit prompt")
    repeated = ["messages"] if record.get("messages") == chosen else []
    rest = {name: value for name, value in record.items() if name != "prompt"}
    left_out, rest = _left_out(rest, "prompt_id", *repeated, "score_chosen", "score_rejected")
    return Reading(rest, "UltraFeedback's rows", left_out)


def _chat_with_prompt(record: Mapping[str, Any]) -> Reading | None:
    """Convert messages with a prompt string that is one of the user's messages."""
    prompt, messages = record.get("prompt"), record.get("messages")
    if not isinstance(prompt, str) or not _is_chat(messages) or {"completion", "responses", *SIDES} & record.keys():
        return None
    if prompt not in [turn.get("content") for turn in messages or [] if turn.get("role") == "user"]:
        allowed = "one of the user's messages, or absent beside messages"
        raise bad_field("prompt", prompt, allowed, reason="wrong type")
    left_out, rest = _left_out({name: value for name, value in record.items() if name != "prompt"}, "prompt_id")
    return Reading(rest, "messages beside their prompt", left_out)


def _openai_pair(record: Mapping[str, Any]) -> Reading | None:
    """Convert input, preferred_output and non_preferred_output of OpenAI's preference fine-tuning."""
    given = record.get("input")
    if not {"preferred_output", "non_preferred_output"} <= record.keys() or not isinstance(given, Mapping):
        return None
    rest = {name: value for name, value in record.items() if name != "input"}
    pair = {"chosen": rest.pop("preferred_output"), "rejected": rest.pop("non_preferred_output")}
    inner = {("prompt" if name == "messages" else name): value for name, value in given.items()}
    left_out, inner = _left_out(inner, "parallel_tool_calls")
    if not inner.get("tools", True):
        del inner["tools"]
    return Reading({**inner, **pair, **rest}, "OpenAI pairs", tuple(f"input.{name}" for name in left_out))


def _text_parts(record: Mapping[str, Any]) -> Reading | None:
    """Convert messages whose content is a list of one text part, {"type": "text", "text": ...}."""
    rewritten = {name: [_one_part(turn) for turn in record[name]] for name in TEXTS if _is_chat(record.get(name))}
    if all(record[name] == turns for name, turns in rewritten.items()):
        return None
    return Reading({**record, **rewritten}, "messages with text parts")


def _one_part(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    parts = turn.get("content")
    if not isinstance(parts, list) or len(parts) != 1 or not isinstance(parts[0], Mapping):
        return turn
    plain = parts[0].get("type") == "text" and parts[0].keys() == {"type", "text"}
    return {**turn, "content": parts[0]["text"]} if plain else turn


def _refuse_dialogue_strings(record: Mapping[str, Any]) -> None:
    """Refuse HH-RLHF's dialogues in strings: they could mean plain text or messages."""
    sides = [record.get(side) for side in SIDES]
    if "prompt_ids" in record or not all(isinstance(side, str) for side in sides):
        return
    prompt, dialogue = record.get("prompt"), re.compile(r"(^|\n)Human: ")
    if isinstance(prompt, str) and dialogue.search(prompt):
        if all(str(side).startswith(prompt.rstrip()) for side in sides):
            raise BadRecord(
                "implicit prompt",
                "fields chosen and rejected are whole dialogues that begin with the field prompt, which would "
                "appear twice; must be what follows the prompt",
                kinds={"dialogue strings"},
            )
    elif prompt is None and all(dialogue.search(str(side)) and "\nAssistant:" in str(side) for side in sides):
        raise BadRecord(
            "missing field",
            "field prompt is missing, and chosen and rejected are whole dialogues as strings; must be "
            r'{"prompt": the shared text through the last "\n\nAssistant:", "chosen": the rest, '
            '"rejected": the rest}, '
            'or chosen and rejected as lists of messages {"role": "user" or "assistant", "content": ...}',
            kinds={"dialogue strings"},
        )


# (converter, our formats that it can produce); the first converter that recognises the record is used.
READERS: tuple[tuple[Callable[[Mapping[str, Any]], Reading | None], tuple[str, ...]], ...] = (
    (_openai_pair, ("preference",)),
    (_ultrafeedback_pair, ("preference",)),
    (_alpaca, ("prompt_completion", "preference")),
    (_sharegpt, ("messages", "prompt_completion", "preference")),
    (_chat_with_prompt, ("messages",)),
    (_text_parts, ("messages", "prompt_completion", "preference")),
)
