"""The part of a rendered conversation that a model is trained on, checked to hold the record's own text.

A chat template may drop reasoning, tools or whole turns. The prompt is always what a response would be sampled from;
the response is what the template writes behind it, or the answer's own text where the template would drop some.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megalign.data.chat import OPENED, Chat, Turn, behind, tool_calls, without_tools
from megalign.data.messages import REASONING
from megalign.data.refusals import BadRecord, refuse
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
        message = "field tools: the chat template does not write them; allowed: a model whose template takes tools"
        raise BadRecord("chat template", message)
    check_written(chat, field, turns, range(len(turns)), text)
    return text


def _continued_text(chat: Chat, field: str, turns: Sequence[Turn], notes: Counter[str]) -> str:
    last, where = turns[-1], f"{field}[{len(turns) - 1}]"
    start = last.get("content")
    if not isinstance(start, str) or last.get("tool_calls"):
        raise refuse(where, last, "content alone, because the response continues it", reason="messages")
    if not start.strip():  # nothing is begun: templates differ in what they leave of the turn
        return chat.text(field, turns[:-1], generation_prompt=True) + start
    if not _is_half(chat, start):
        with contextlib.suppress(BadRecord):
            text, head = chat.text(field, turns, continued=True), chat.text(field, turns[:-1])
            if not lost(last, text[len(os.path.commonprefix([head, text])) :]):
                return text
    if any(last.get(name) for name in REASONING):
        allowed = "a beginning that the chat template writes whole, or one with its reasoning inside content"
        raise refuse(where, last, allowed, reason="chat template")
    text = behind(chat.text(field, turns[:-1], generation_prompt=True), start)
    notes["prompts whose last message stands behind the generation prompt as it is"] += 1
    return text


def _is_half(chat: Chat, text: str) -> bool:
    """Whether `text` opens <think> and never closes it while the template parses reasoning by </think>."""
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
    """Return what follows `prompt`, and which of its characters are scored (None: all).

    continued: `before` ends with the assistant's turn that the answer's first turn continues.
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
        if whole != chat.text(field, turns) or any(lost(own, written) for own in owns if own["role"] == "assistant"):
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
    """Return the text of one answer behind the prompt; refuse the record if the template drops a part of it."""
    head = before[:-1] if continued else before
    whole = chat.text(field, [*head, _merged(before[-1], own) if continued else own])
    if whole.startswith(prompt):
        rest, tag = whole[len(prompt) :], _shared_tag(prompt, own)
        twice = bool(tag) and not lost(own, rest)
        dropped = lost(own, tag + rest)
        half = not tag and _is_half(chat, own.get("content") or "") and rest.lstrip().startswith("<think>")
        half = half and not rest.lstrip().startswith(own["content"].strip())
        if not twice and not dropped and not half:
            return rest
        why = f"opens {tag.strip() or '<think>'} twice" if twice or half else f"drops {shorten(dropped)} of the answer"
    else:
        why = "writes the beginning otherwise once the answer follows"
        shared = len(os.path.commonprefix([prompt, whole]))
        if not prompt[shared:].strip() and not lost(own, whole[shared:]):
            notes["answers put behind the generation prompt, which the chat template spaces otherwise before them"] += 1
            return whole[shared:]
    text = own.get("content")
    closing = _closing(chat, field, head)
    if not text or own.get("tool_calls") or any(own.get(name) for name in REASONING) or closing is None:
        message = (
            f"field {field}: the chat template {why}, and only plain content can stand behind its generation prompt"
        )
        allowed = "answers that it writes whole"
        if any(own.get(name) for name in REASONING) and not own.get("tool_calls"):
            allowed += ", such as the reasoning inside content, as <think>...</think> before the answer"
        raise BadRecord("chat template", f"{message} as it is; allowed: {allowed}")
    text = text if continued else behind(prompt, text)[len(prompt) :]
    notes["answers put behind the generation prompt as they are, because the chat template would change them"] += 1
    opened = OPENED.search(prompt)
    if opened and THINK.fullmatch(opened[1]) and not re.search(r"</think>|\[/THINK\]", text):
        notes[f"answers that do not close the {opened[1]} that the generation prompt opens"] += 1
    return text + closing


def _shared_tag(prompt: str, own: Turn) -> str:
    """Return the tag that the prompt ends with where the answer's own text begins with it, too."""
    opened = OPENED.search(prompt)
    text = own.get("content") or ""
    return opened[0] if opened and text.lstrip().startswith(opened[1]) else ""


def _closing(chat: Chat, field: str, before: Sequence[Turn]) -> str | None:
    """Return what the template writes behind an answer's text."""
    text = chat.text(field, [*before, {"role": "assistant", "content": PROBE}])
    return text.rpartition(PROBE)[2] if PROBE in text else None


def _locate(
    chat: Chat, field: str, turns: Sequence[Turn], owns: Sequence[Turn], whole: str, *, start: int
) -> list[Span]:
    """Return (start, end) in `whole` of each assistant turn in `owns`, which are the last of `turns`."""
    first = len(turns) - len(owns)
    places = [place for place in range(first, len(turns)) if turns[place]["role"] == "assistant"]
    starts = [start]
    for place in places[1:]:
        history = chat.text(field, turns[:place], generation_prompt=True)
        if not whole.startswith(history):
            raise _rewritten(field, _difference(history, whole))
        starts.append(len(history))
    spans = []
    for place, begin, bound in zip(places, starts, [*starts[1:], len(whole)], strict=True):
        own = owns[place - first]
        end = _end(chat, field, turns, place, whole, begin=begin, bound=bound)
        dropped = lost(own, _shared_tag(whole[:begin], own) + whole[begin:end])
        if dropped:
            raise _rewritten(field, f"it drops {shorten(dropped)}")
        spans.append((begin, end))
    return spans


def _end(chat: Chat, field: str, turns: Sequence[Turn], place: int, whole: str, *, begin: int, bound: int) -> int:
    """Return where turn `place`, which begins at `begin`, ends in the whole text; `begin` where it cannot be told."""
    if bound == len(whole):
        return bound
    closed = chat.text(field, turns[: place + 1])
    if whole.startswith(closed):
        return len(closed)
    # An earlier turn may be written otherwise than a last one, with its text whole all the same: without what a last
    # one begins with, such as empty reasoning, or with another end.
    tails = (end for end in range(bound, begin, -1) if closed.endswith(whole[begin:end]))
    tail = next(tails, begin)
    if not lost(turns[place], whole[begin:tail]):
        return tail
    text = str(turns[place].get("content") or "").strip()
    probe = {"role": "assistant", "content": PROBE}
    probed, _, after = chat.text(field, [*turns[:place], probe, *turns[place + 1 :]]).partition(PROBE)
    end = len(probed) + len(text)
    if not text or not after or whole[:end] != probed + text or len(probed) < begin:
        return begin
    closing = os.path.commonprefix([whole[end:bound], after, _closing(chat, field, turns[:place]) or ""])
    return end + len(re.sub(r"[<\[][^<>\[\]\s]*$", "", closing))  # the beginning of a tag is none


def _difference(prompt: str, whole: str) -> str:
    """Show where the text that an answer would be sampled from and the whole conversation part."""
    start = len(os.path.commonprefix([prompt, whole]))
    return f"{shorten(prompt[start:])} stands before an answer that is sampled, and {shorten(whole[start:])} here"


def _rewritten(field: str, detail: str) -> BadRecord:
    message = (
        f"field {field}: the chat template writes earlier turns otherwise once others follow ({detail}); allowed: "
        "conversations whose beginning it leaves as it is, data.train_on: last_assistant, or a record for each answer"
    )
    return BadRecord("chat template", message)


def check_written(chat: Chat, field: str, turns: Sequence[Turn], places: Sequence[int], text: str) -> None:
    """Refuse turns and tool calls that the template leaves out; it may shorten earlier answers of the assistant."""
    for place in places:
        turn, where = turns[place], f"{field}[{place}]"
        dropped = _lost_call(turn, text)
        if dropped:
            raise _unwritten_call(where, dropped)
        content = turn.get("content")
        if turn["role"] == "assistant" or not content or content.strip() in text:
            continue
        # It may stand there in another form, such as JSON; then other words give another text.
        changed = [*turns[:place], {**turn, "content": content + PROBE}, *turns[place + 1 :]]
        if _same(field, turns, chat, chat, changed):
            raise _unwritten_turn(where, turn)
    # The same words may stand elsewhere, such as a function's name among the tools: marks of each turn must come too.
    marked = [_marked(turn, place) if place in places else turn for place, turn in enumerate(turns)]
    try:
        rendered = chat.text(field, marked)
    except BadRecord:
        return  # a template that takes these words alone
    for place in places:
        turn, mark, where = turns[place], _mark(place), f"{field}[{place}]"
        if turn["role"] != "assistant" and turn.get("content") and f"{mark}content" not in rendered:
            raise _unwritten_turn(where, turn)
        for number, call in enumerate(tool_calls(turn)):
            if f"{mark}call{number}-" not in rendered:
                raise _unwritten_call(where, call["name"])


def _mark(place: int) -> str:
    return f"{PROBE}-{place}-"


def _marked(turn: Turn, place: int) -> dict[str, Any]:
    """Append a marker to the turn's content and to each called function's name."""
    marked = dict(turn)
    if turn["role"] != "assistant" and turn.get("content"):
        marked["content"] = f"{turn['content']} {_mark(place)}content"
    if turn.get("tool_calls"):
        marked["tool_calls"] = [
            {**call, "function": {**call["function"], "name": f"{call['function']['name']}{_mark(place)}call{number}-"}}
            if "function" in call
            else {**call, "name": f"{call['name']}{_mark(place)}call{number}-"}
            for number, call in enumerate(turn["tool_calls"])
        ]
    return marked


def _unwritten_turn(where: str, turn: Turn) -> BadRecord:
    message = f"field {where}.content: the chat template does not write what the {turn['role']} says there"
    return BadRecord("chat template", f"{message}; allowed: turns that it writes")


def _unwritten_call(where: str, dropped: str) -> BadRecord:
    message = f"field {where}.tool_calls: the chat template does not write {shorten(dropped)}"
    return BadRecord("chat template", f"{message}; allowed: a model whose template takes tool calls")


def _same(field: str, turns: Sequence[Turn], chat: Chat, other: Chat, changed: Sequence[Turn] | None = None) -> bool:
    """Return whether both chats render the same text; False if one of them refuses the turns."""
    try:
        return chat.text(field, turns) == other.text(field, changed or turns)
    except BadRecord:
        return False


def lost(turn: Turn, text: str) -> str | None:
    """Return the first part of the turn's own text that `text` lacks, whitespace at the parts' ends aside.

    Reasoning, its tags and the content stand in this order; tool calls stand anywhere.
    """
    reasoning = next((turn[name] for name in REASONING if turn.get(name)), "")
    position = 0
    for part in (reasoning, *THINK.split(turn.get("content") or "")):
        found = text.find(part.strip(), position)
        if found < 0:
            return str(part)
        position = found + len(part.strip())
    return _lost_call(turn, text)


def _lost_call(turn: Turn, text: str) -> str | None:
    """Return a name, key or value of the turn's tool calls that `text` does not hold."""
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
    """Return how a template may write a value: as bare text, as Python does, or as JSON with or without its quotes."""
    if not isinstance(leaf, str):
        return [str(leaf), json.dumps(leaf)]
    return [leaf, *(json.dumps(leaf, ensure_ascii=escaped)[1:-1] for escaped in (False, True))]
