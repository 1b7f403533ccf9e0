"""Check messages, tools and template variables of a record, before the chat template renders them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from megalign.data.refusals import MISSING, bad_field, run_all

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking", "reasoning")  # a turn's reasoning: transformers takes any of these
MESSAGE_FIELDS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", *REASONING})
CALL = '{"type": "function", "function": {"name": ..., "arguments": {...}}}'
TOOLS = "a list of JSON schemas of functions, or that list as JSON text"


def check_messages(field: str, value: Any) -> None:
    """Refuse a value that is not a list of messages, each with a role and text (or an assistant's tool calls)."""
    if not isinstance(value, list) or not value:
        raise bad_field(field, value, "a list of messages", reason="messages")
    run_all(check for index, message in enumerate(value) for check in _checks(f"{field}[{index}]", message))


def _checks(where: str, message: Any) -> Iterator[Callable[[], None]]:
    """Yield the checks of one message; each raises `BadRecord` for the first fault in its own part."""
    if not isinstance(message, dict):
        yield partial(_refuse_shape, where, message)
        return
    yield partial(_check_role, where, message)
    yield partial(_check_calls, where, message)
    yield partial(_check_texts, where, message)


def _refuse_shape(where: str, message: Any) -> None:
    raise bad_field(where, message, '{"role": ..., "content": ...}', reason="messages")


def _check_role(where: str, message: Mapping[str, Any]) -> None:
    if message.get("role") not in ROLES:
        raise bad_field(f"{where}.role", message.get("role", MISSING), ", ".join(ROLES), reason="messages")


def _check_texts(where: str, message: Mapping[str, Any]) -> None:
    content = message.get("content", MISSING)
    if not isinstance(content, str) and not (content in (None, MISSING) and message.get("tool_calls")):
        raise bad_field(f"{where}.content", content, "a string", reason="messages")
    for name in ("content", "name", "tool_call_id", *REASONING):
        text = message.get(name)
        if text is not None and not isinstance(text, str):
            raise bad_field(f"{where}.{name}", text, "a string", reason="messages")
        check_unicode(f"{where}.{name}", text or "")


def _check_calls(where: str, message: Mapping[str, Any]) -> None:
    calls = message.get("tool_calls")
    if calls is None or calls == []:
        return
    if message.get("role") != "assistant":
        allowed = "absent: only messages of the assistant have tool calls"
        raise bad_field(f"{where}.tool_calls", calls, allowed, reason="messages")
    if not isinstance(calls, list):
        raise bad_field(f"{where}.tool_calls", calls, f"a list of {CALL}", reason="messages")
    for index, call in enumerate(calls):
        inner = call.get("function", call) if isinstance(call, dict) else None
        name = inner.get("name") if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or not isinstance(name, str) or not name:
            raise bad_field(f"{where}.tool_calls[{index}]", call, CALL, reason="messages")
        if not isinstance(inner.get("arguments", {}), (dict, str)):
            at = f"{where}.tool_calls[{index}].function.arguments"
            raise bad_field(at, inner["arguments"], "an object, or an object as JSON text", reason="messages")
        check_unicode(f"{where}.tool_calls[{index}]", json.dumps(call, ensure_ascii=False))


def check_context(record: Mapping[str, Any]) -> None:
    """Check `tools` and `chat_template_kwargs`; a prompt of plain text takes neither."""
    tools, variables = record.get("tools"), record.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise bad_field("tools", tools, TOOLS, reason="tools") from None
    good = isinstance(tools, list) and all(isinstance(tool, dict) and tool for tool in tools)
    if tools is not None and not good:
        raise bad_field("tools", tools, TOOLS, reason="tools")
    if variables is not None and not isinstance(variables, dict):
        raise bad_field("chat_template_kwargs", variables, "{name: value}", reason="chat template")
    prompt = record.get("prompt")
    for name, value in (("tools", tools), ("chat_template_kwargs", variables)):
        if value and isinstance(prompt, str):
            allowed = "absent, or the prompt a list of messages: a plain string is not rendered by a chat template"
            raise bad_field(name, record[name], allowed, reason="chat template")
        check_unicode(name, json.dumps(value, ensure_ascii=False, default=str))


def check_unicode(field: str, value: str) -> None:
    """Refuse text with a lone surrogate, which JSON can express and no tokenizer accepts."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise bad_field(field, value, "valid Unicode", reason="text") from None


def check_answers(field: str, messages: Sequence[Mapping[str, Any]], *, first: int = 0) -> None:
    """Refuse an answer whose message `first` or last message is not the assistant's."""
    for index in (first, len(messages) - 1):
        if messages[index]["role"] != "assistant":
            raise bad_field(f"{field}[{index}].role", messages[index]["role"], "assistant", reason="messages")


def check_conversation(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a conversation that begins with the assistant or does not end with it."""
    if messages[0]["role"] == "assistant":
        raise bad_field("messages[0].role", "assistant", "system or user before the first answer", reason="messages")
    check_answers("messages", messages, first=len(messages) - 1)
