"""Render prompts and answers with the chat template, and check that they still hold the record's own text.

A chat template may drop reasoning, tools or whole turns. The prompt is always what a response would be sampled from;
the response is what the template renders after it, or the answer's own text where the template would drop some.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megalign.data.chat import OPENED, Chat, Turn, append_text, tool_calls, without_tools
from megalign.data.messages import REASONING
from megalign.data.refusals import BadRecord, bad_field
from megalign.schema import shorten

Span = tuple[int, int]
PROBE = "megalign-probe"
THINK = re.compile(r"(</?think>|\[/?THINK\])")


def prompt_text(chat: Chat, field: str, turns: Sequence[Turn], *, continued: bool, notes: Counter[str]) -> str:
    """Render the prompt that a response is sampled from; continued: leave a last assistant turn open."""
    if continued and turns[-1]["role"] == "assistant":
        text = _continued_text(chat, field, turns, notes)
    else:
        continued = False
        text = chat.text(field, turns, generation_prompt=True)
    if chat.tools and _same(field, turns, chat, without_tools(chat)):
        message = "field tools: the chat template does not render them; must be absent for this template"
        raise BadRecord("chat template", message)
    check_written(chat, field, turns, range(len(turns)), text)
    return text


def _continued_text(chat: Chat, field: str, turns: Sequence[Turn], notes: Counter[str]) -> str:
    last, where = turns[-1], f"{field}[{len(turns) - 1}]"
    start = last.get("content")
    if not isinstance(start, str) or last.get("tool_calls"):
        raise bad_field(where, last, "content alone, because the response continues it", reason="messages")
    if not start.strip():  # the turn is still empty: templates differ in how they render an empty turn
        return chat.text(field, turns[:-1], generation_prompt=True) + start
    if not _is_half(chat, start):
        with contextlib.suppress(BadRecord):
            text, head = chat.text(field, turns, continued=True), chat.text(field, turns[:-1])
            if not missing_part(last, text[len(os.path.commonprefix([head, text])) :]):
                return text
    if any(last.get(name) for name in REASONING):
        allowed = "a beginning that the chat template renders in full, or one with its reasoning inside content"
        raise bad_field(where, last, allowed, reason="chat template")
    text = append_text(chat.text(field, turns[:-1], generation_prompt=True), start)
    notes["prompts whose last message is appended verbatim to the generation prompt"] += 1
    return text


def _is_half(chat: Chat, text: str) -> bool:
    """Return whether `text` opens <think> without closing it, and the template splits reasoning off at </think>."""
    return "<think>" in text and "</think>" not in text and "</think>" in chat.template


def answer_text(
    chat: Chat,
    field: str,
    before: Sequence[Turn],
    answer: Sequence[Turn],
    *,
    prompt: str,
    continued: bool,
    notes: Counter[str],
) -> tuple[str, list[Span] | None]:
    """Return the text that follows `prompt`, and the spans of its characters that are scored (None: all).

    continued: `before` ends with an open assistant turn, which the answer's first turn continues.
    """
    if len(answer) == 1:
        return _last_turn(chat, field, before, answer[0], prompt=prompt, continued=continued, notes=notes), None
    turns, first = [*before, *answer], len(before)
    if continued:
        turns, first = [*before[:-1], _merged(before[-1], answer[0]), *answer[1:]], len(before) - 1
    opened = chat.text(field, turns[:-1], generation_prompt=True)
    whole = opened + _last_turn(chat, field, turns[:-1], turns[-1], prompt=opened, continued=False, notes=notes)
    if not whole.startswith(prompt):
        raise _rewritten(field, _difference(prompt, whole))
    check_written(chat, field, turns, range(first, len(turns)), whole)
    owns = [answer[0], *turns[first + 1 :]]
    try:
        spans = _locate(chat, field, turns, owns, whole, start=len(prompt))
    except BadRecord:
        spans = [(max(start, len(prompt)), end) for start, end in chat.generation_spans(turns) if end > len(prompt)]
        written = "".join(whole[start:end] for start, end in spans)
        if whole != chat.text(field, turns) or any(
            missing_part(own, written) for own in owns if own["role"] == "assistant"
        ):
            raise
    return whole[len(prompt) :], [(start - len(prompt), end - len(prompt)) for start, end in spans]


def _merged(start: Turn, rest: Turn) -> dict[str, Any]:
    return {**start, **rest, "content": (start.get("content") or "") + (rest.get("content") or "")}


def _last_turn(
    chat: Chat,
    field: str,
    before: Sequence[Turn],
    own: Turn,
    *,
    prompt: str,
    continued: bool,
    notes: Counter[str],
) -> str:
    """Return the rendered text of one answer after the prompt; refuse the record if the template drops part of it."""
    head = before[:-1] if continued else before
    whole = chat.text(field, [*head, _merged(before[-1], own) if continued else own])
    if whole.startswith(prompt):
        rest, tag = whole[len(prompt) :], _shared_tag(prompt, own)
        twice = bool(tag) and not missing_part(own, rest)
        dropped = missing_part(own, tag + rest)
        half = not tag and _is_half(chat, own.get("content") or "") and rest.lstrip().startswith("<think>")
        half = half and not rest.lstrip().startswith(own["content"].strip())
        if not twice and not dropped and not half:
            return rest
        why = f"opens {tag.strip() or '<think>'} twice" if twice or half else f"drops {shorten(dropped)} of the answer"
    else:
        why = "renders the prompt differently once the answer follows"
        shared = len(os.path.commonprefix([prompt, whole]))
        if not prompt[shared:].strip() and not missing_part(own, whole[shared:]):
            notes[
                "answers appended to the generation prompt, because the chat template changes its last whitespace"
            ] += 1
            return whole[shared:]
    text = own.get("content")
    closing = _closing(chat, field, head)
    if not text or own.get("tool_calls") or any(own.get(name) for name in REASONING) or closing is None:
        message = (
            f"field {field}: the chat template {why}, and only plain content can be appended to its generation prompt"
        )
        allowed = "an answer that it renders in full"
        if any(own.get(name) for name in REASONING) and not own.get("tool_calls"):
            allowed += ", such as the reasoning inside content, as <think>...</think> before the answer"
        raise BadRecord("chat template", f"{message} verbatim; must be {allowed}")
    text = text if continued else append_text(prompt, text)[len(prompt) :]
    notes["answers appended verbatim to the generation prompt, because the chat template would change them"] += 1
    opened = OPENED.search(prompt)
    if opened and THINK.fullmatch(opened[1]) and not re.search(r"</think>|\[/THINK\]", text):
        notes[f"answers that do not close the {opened[1]} that the generation prompt opens"] += 1
    return text + closing


def _shared_tag(prompt: str, own: Turn) -> str:
    """Return the tag, such as <think>, that ends the prompt and also begins the answer's text; else an empty string."""
    opened = OPENED.search(prompt)
    text = own.get("content") or ""
    return opened[0] if opened and text.lstrip().startswith(opened[1]) else ""


def _closing(chat: Chat, field: str, before: Sequence[Turn]) -> str | None:
    """Return what the template renders after an answer's text, such as <|im_end|>; None if it drops the text."""
    text = chat.text(field, [*before, {"role": "assistant", "content": PROBE}])
    return text.rpartition(PROBE)[2] if PROBE in text else None


def _locate(
    chat: Chat, field: str, turns: Sequence[Turn], owns: Sequence[Turn], whole: str, *, start: int
) -> list[Span]:
    """Return (start, end) in `whole` of each assistant turn in `owns`, the last len(owns) of `turns`."""
    first = len(turns) - len(owns)
    indices = [index for index in range(first, len(turns)) if turns[index]["role"] == "assistant"]
    starts = [start]
    for index in indices[1:]:
        history = chat.text(field, turns[:index], generation_prompt=True)
        if not whole.startswith(history):
            raise _rewritten(field, _difference(history, whole))
        starts.append(len(history))
    spans = []
    for index, begin, bound in zip(indices, starts, [*starts[1:], len(whole)], strict=True):
        own = owns[index - first]
        end = _end(chat, field, turns, index, whole, begin=begin, bound=bound)
        dropped = missing_part(own, _shared_tag(whole[:begin], own) + whole[begin:end])
        if dropped:
            raise _rewritten(field, f"it drops {shorten(dropped)}")
        spans.append((begin, end))
    return spans


def _end(chat: Chat, field: str, turns: Sequence[Turn], index: int, whole: str, *, begin: int, bound: int) -> int:
    """Return the end in `whole` of turn `index`, which begins at `begin`; `begin` itself if the end is unknown."""
    if bound == len(whole):
        return bound
    closed = chat.text(field, turns[: index + 1])
    if whole.startswith(closed):
        return len(closed)
    # A template may render an earlier turn differently from a last one and still keep its text: without the empty
    # reasoning that a last turn begins with, or with another end.
    tails = (end for end in range(bound, begin, -1) if closed.endswith(whole[begin:end]))
    tail = next(tails, begin)
    if not missing_part(turns[index], whole[begin:tail]):
        return tail
    text = str(turns[index].get("content") or "").strip()
    probe = {"role": "assistant", "content": PROBE}
    probed, _, after = chat.text(field, [*turns[:index], probe, *turns[index + 1 :]]).partition(PROBE)
    end = len(probed) + len(text)
    if not text or not after or whole[:end] != probed + text or len(probed) < begin:
        return begin
    closing = os.path.commonprefix([whole[end:bound], after, _closing(chat, field, turns[:index]) or ""])
    return end + len(re.sub(r"[<\[][^<>\[\]\s]*$", "", closing))  # half a tag is no closing text


def _difference(prompt: str, whole: str) -> str:
    """Describe where the prompt of an answer and the whole rendered conversation begin to differ."""
    start = len(os.path.commonprefix([prompt, whole]))
    return f"the prompt of an answer has {shorten(prompt[start:])}, and the whole conversation {shorten(whole[start:])}"


def _rewritten(field: str, detail: str) -> BadRecord:
    message = (
        f"field {field}: the chat template renders earlier turns differently once others follow ({detail}); must be "
        "a conversation whose beginning it leaves unchanged, data.train_on: last_assistant, or a record for each answer"
    )
    return BadRecord("chat template", message)


def check_written(chat: Chat, field: str, turns: Sequence[Turn], indices: Sequence[int], text: str) -> None:
    """Refuse the record if the template leaves out a turn or tool call; it may shorten earlier assistant answers."""
    for index in indices:
        turn, where = turns[index], f"{field}[{index}]"
        dropped = _lost_call(turn, text)
        if dropped:
            raise _unwritten_call(where, dropped)
        content = turn.get("content")
        if turn["role"] == "assistant" or not content or content.strip() in text:
            continue
        # The content may be rendered in another form, such as JSON; then changed content changes the text.
        changed = [*turns[:index], {**turn, "content": content + PROBE}, *turns[index + 1 :]]
        if _same(field, turns, chat, chat, changed):
            raise _unwritten_turn(where, turn)
    # The same words may occur elsewhere, such as a function's name among the tools, so markers in each turn are looked
    # for as well.
    marked = [_marked(turn, index) if index in indices else turn for index, turn in enumerate(turns)]
    try:
        rendered = chat.text(field, marked)
    except BadRecord:
        return  # the template accepts only the original words
    for index in indices:
        turn, mark, where = turns[index], _mark(index), f"{field}[{index}]"
        if turn["role"] != "assistant" and turn.get("content") and f"{mark}content" not in rendered:
            raise _unwritten_turn(where, turn)
        for number, call in enumerate(tool_calls(turn)):
            if f"{mark}call{number}-" not in rendered:
                raise _unwritten_call(where, call["name"])


def _mark(index: int) -> str:
    return f"{PROBE}-{index}-"


def _marked(turn: Turn, index: int) -> dict[str, Any]:
    """Return the turn with a marker appended to its content and to each called function's name."""
    marked = dict(turn)
    if turn["role"] != "assistant" and turn.get("content"):
        marked["content"] = f"{turn['content']} {_mark(index)}content"
    if turn.get("tool_calls"):
        marked["tool_calls"] = [
            {**call, "function": {**call["function"], "name": f"{call['function']['name']}{_mark(index)}call{number}-"}}
            if "function" in call
            else {**call, "name": f"{call['name']}{_mark(index)}call{number}-"}
            for number, call in enumerate(turn["tool_calls"])
        ]
    return marked


def _unwritten_turn(where: str, turn: Turn) -> BadRecord:
    message = f"field {where}.content: the chat template does not render the {turn['role']}'s content"
    return BadRecord("chat template", f"{message}; must be turns that it renders")


def _unwritten_call(where: str, dropped: str) -> BadRecord:
    message = f"field {where}.tool_calls: the chat template does not render {shorten(dropped)}"
    return BadRecord("chat template", f"{message}; must be absent for this template")


def _same(field: str, turns: Sequence[Turn], chat: Chat, other: Chat, changed: Sequence[Turn] | None = None) -> bool:
    """Return whether both chats render the same text; False if one of them refuses the turns."""
    try:
        return chat.text(field, turns) == other.text(field, changed or turns)
    except BadRecord:
        return False


def missing_part(turn: Turn, text: str) -> str | None:
    """Return the first part of the turn's own text that `text` lacks, ignoring whitespace around the parts; else None.

    Reasoning, its tags and the content must appear in this order; tool calls may appear anywhere.
    """
    reasoning = next((turn[name] for name in REASONING if turn.get(name)), "")
    position = 0
    for part in (reasoning, *THINK.split(turn.get("content") or "")):
        start = text.find(part.strip(), position)
        if start < 0:
            return str(part)
        position = start + len(part.strip())
    return _lost_call(turn, text)


def _lost_call(turn: Turn, text: str) -> str | None:
    """Return the first name, key or value of the turn's tool calls that `text` lacks; else None."""
    for call in tool_calls(turn):
        arguments = call.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments)
        for leaf in (call["name"], *_leaves(arguments)):
            if not any(form in text for form in _forms(leaf)):
                return str(leaf)
    return None


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif value is not None:
        yield value


def _forms(leaf: Any) -> list[str]:
    """Return the forms in which a template may write a value: bare text, Python's, or JSON with or without quotes."""
    if not isinstance(leaf, str):
        return [str(leaf), json.dumps(leaf)]
    return [leaf, *(json.dumps(leaf, ensure_ascii=escaped)[1:-1] for escaped in (False, True))]
