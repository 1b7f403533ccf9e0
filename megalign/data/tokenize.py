"""Convert the texts of records into token ids, the same way for every loss.

Plain strings never use a chat template: the prompt begins with the special tokens that the tokenizer adds in front;
the response is the rest of the ids of prompt and response tokenised together, closed by the end-of-sequence token.
Messages get the template's own tokens and nothing more: the prompt is what a response would be sampled from, the
response what follows it. Token ids are used unchanged.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megalign.data.answers import Span, answer_text, prompt_text
from megalign.data.chat import Chat, Turn, adapted, open_chat, without_nulls
from megalign.data.group import Group, Response
from megalign.data.messages import REASONING
from megalign.data.records import BadRecord, bad_field, detect_format
from megalign.schema import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TextOptions:
    """Holds the settings of `data` that affect how text becomes tokens."""

    special_tokens: Literal["auto", "none"] = "auto"  # before plain strings: the tokenizer's own, or none
    date: str | None = None  # YYYY-MM-DD that chat templates get as today; None: the day of the call


DEFAULT = TextOptions()
LONG = 16  # characters of a prompt too long for a response to repeat by chance
ANCHORS = "\n\t:a0"  # texts are encoded after the first of these whose token does not merge with them


def encode_record(
    record: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    format: str,
    train_on: str = "last_assistant",
    options: TextOptions = DEFAULT,
    notes: Counter[str] | None = None,
) -> tuple[Ids, tuple[Response, ...]]:
    """Return prompt ids and the responses, in file order, of a record that `check_record` accepted as `format`.

    notes: counts decisions about the text, for the log.
    """
    text = _Text(record, tokenizer, options, Counter() if notes is None else notes)
    if format == "messages":
        turns = record["messages"]
        first = len(turns) - 1
        if train_on == "all_assistant":
            first = next(index for index, turn in enumerate(turns) if turn["role"] == "assistant")
        before = text.prompt("messages", turns[:first], continued=False)
        return before.ids, (text.turns("messages", before, turns[first:], num_before=first),)
    prompt, answers = _split(record, format)
    if isinstance(prompt, list):
        # Only an explicit prompt may leave its last assistant turn open: a shared beginning consists of whole messages.
        explicit = "prompt" in record
        before = text.prompt("prompt" if explicit else answers[0][0], prompt, continued=explicit)
        return before.ids, tuple(_encode_answer(answer, text, before) for answer in answers)
    if isinstance(prompt, str):
        front, bare = _string_prompt(prompt, tokenizer, options, text.notes)
        before = _Prompt(front + bare, prompt, (), num_front=len(front))
    else:
        before = _Prompt(tuple(record["prompt_ids"]), None, ())
    return before.ids, tuple(_encode_answer(answer, text, before) for answer in answers)


def token_fields(record: Mapping[str, Any], format: str) -> list[str]:
    """Return the record's field of the prompt, then of each response, for errors."""
    if format == "messages":
        return ["messages", "messages"]
    prompt = next((field for field in ("prompt_ids", "prompt") if field in record), "chosen")
    return [prompt, *(field for field, _, _ in _split(record, format)[1])]


def encode_prompt(
    record: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    options: TextOptions = DEFAULT,
    notes: Counter[str] | None = None,
) -> Ids:
    """Return the prompt ids to sample from, of a record with `prompt` (text or messages) or `prompt_ids`.

    notes: counts decisions about the text, for the log.
    """
    notes = Counter() if notes is None else notes
    if "prompt_ids" in record:
        return tuple(record["prompt_ids"])
    prompt = record["prompt"]
    if isinstance(prompt, list):
        return _Text(record, tokenizer, options, notes).prompt("prompt", prompt, continued=True).ids
    front, bare = _string_prompt(prompt, tokenizer, options, notes)
    return front + bare


def _string_prompt(
    prompt: str, tokenizer: PreTrainedTokenizerBase | None, options: TextOptions, notes: Counter[str]
) -> tuple[Ids, Ids]:
    """Return the special tokens in front of a plain-string prompt, and the ids of its text."""
    tokenizer = _required("prompt", tokenizer)
    bare = _encode(tokenizer, prompt)
    front = _front(tokenizer, prompt, bare) if options.special_tokens == "auto" else ()
    if front and bare[: len(front)] == front:
        start = "".join(tokenizer.convert_ids_to_tokens(list(front)))
        notes[f"prompts that begin with {start} twice: in their text, and added by data.special_tokens: auto"] += 1
    return front, bare


def retokenize(
    group: Group,
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str = "auto",
    train_on: str = "last_assistant",
    origin: str = "",
    options: TextOptions = DEFAULT,
) -> tuple[Ids, Response]:
    """Return prompt ids and the single response of a record, encoded with a teacher's tokenizer and chat template."""
    where = origin or f"record {group.record}"
    name = detect_format(group.raw) if format == "auto" else format
    ids = [field for field in ("prompt_ids", "response_ids") if field in group.raw]
    ids += ["responses[0].response_ids" for entry in group.raw.get("responses", [])[:1] if "response_ids" in entry]
    if ids:
        raise UserError(
            f"{where}: field {ids[0]} holds token ids, and a teacher with another tokenizer needs text; "
            "must be messages, prompt with completion, or teacher_scores in the record"
        )
    try:
        prompt_ids, responses = encode_record(group.raw, tokenizer, format=name, train_on=train_on, options=options)
    except BadRecord as error:
        raise UserError(f"{where}: under the teacher's tokenizer: {error}") from None
    if not prompt_ids:
        raise UserError(f"{where}: field prompt has no tokens under the teacher's tokenizer; must be one or more")
    return prompt_ids, responses[0]


def _split(record: Mapping[str, Any], format: str) -> tuple[Any, list[tuple[str, Any, Mapping[str, Any]]]]:
    """Return the prompt, and (field, text or {"ids"}, mapping with reward and logp) of each response."""
    prompt = {"ids": record["prompt_ids"]} if "prompt_ids" in record else record.get("prompt")
    if format == "responses":
        return prompt, [
            (f"responses[{index}].{'response_ids' if 'response_ids' in entry else 'text'}", _content(entry), entry)
            for index, entry in enumerate(record["responses"])
        ]
    if format == "prompt_completion":
        field = "response_ids" if "response_ids" in record else "completion"
        return prompt, [(field, {"ids": record[field]} if field == "response_ids" else record[field], {})]
    sides = {side: f"{side}_ids" if f"{side}_ids" in record else side for side in ("chosen", "rejected")}
    texts: dict[str, Any] = {
        side: {"ids": record[form]} if form != side else record[form] for side, form in sides.items()
    }
    if prompt is None:
        prompt, texts = _implicit_prompt(texts["chosen"], texts["rejected"])
    return prompt, [(sides[side], texts[side], {}) for side in ("chosen", "rejected")]


def _content(entry: Mapping[str, Any]) -> Any:
    return {"ids": entry["response_ids"]} if "response_ids" in entry else entry["text"]


def _implicit_prompt(chosen: list[Turn], rejected: list[Turn]) -> tuple[list[Turn], dict[str, Any]]:
    """Return the messages that both sides begin with as the prompt, and the rest of each side."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    allowed = "two conversations that begin with the same messages and end with different answers (or a prompt field)"
    if chosen == rejected:
        raise BadRecord("implicit prompt", f"field rejected is the same conversation as chosen; must be {allowed}")
    if shared == 0:
        raise bad_field("chosen[0]", chosen[0], allowed, reason="implicit prompt")
    texts = {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    for side, turns in texts.items():
        if not turns or turns[0]["role"] != "assistant":
            raise bad_field(side, turns, allowed, reason="implicit prompt")
    return chosen[:shared], texts


@dataclass(frozen=True, slots=True)
class _Prompt:
    """Holds a prompt's ids, its text (None: given as ids), and its turns if it is messages."""

    ids: Ids
    text: str | None
    turns: Sequence[Turn]
    continued: bool = False  # the last turn is the assistant's and is left open
    chat: Chat | None = None
    num_front: int = 0  # special tokens in front, which are not in the text


class _Text:
    """Encodes the texts of one record."""

    def __init__(
        self,
        record: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase | None,
        options: TextOptions,
        notes: Counter[str],
    ) -> None:
        self.record, self.tokenizer, self.options, self.notes = record, tokenizer, options, notes
        self.changed = False  # whether tool-call arguments were changed for the template: counted once per record

    def prompt(self, field: str, turns: Sequence[Turn], *, continued: bool) -> _Prompt:
        """Return the encoded prompt of messages; continued: leave a last assistant turn open."""
        tokenizer = _required(field, self.tokenizer)
        chat = open_chat(field, self.record, tokenizer, date=self.options.date)
        turns = self._given(chat, field, (), turns)
        continued = continued and turns[-1]["role"] == "assistant"
        text = prompt_text(chat, field, turns, continued=continued, notes=self.notes)
        return _Prompt(_encode(tokenizer, text), text, turns, continued, chat)

    def turns(self, field: str, before: _Prompt, answer: Sequence[Turn], *, num_before: int = 0) -> Response:
        """Return the encoded turns that follow a prompt; of several turns only the assistant's are scored."""
        for index, turn in enumerate(answer, start=num_before):
            said = any(turn.get(name) for name in ("content", "tool_calls", *REASONING))
            if turn["role"] == "assistant" and not said:
                raise bad_field(f"{field}[{index}].content", "", "a string that is not empty", reason="empty response")
        assert before.chat is not None and before.text is not None
        rest, spans = answer_text(
            before.chat,
            field,
            before.turns,
            self._given(before.chat, field, before.turns, answer),
            prompt=before.text,
            continued=before.continued,
            notes=self.notes,
        )
        ids, encode_start = self._behind(field, before.text, before.ids, rest)
        return Response(ids, scored=None if spans is None else _scored(ids, spans, rest, encode_start))

    def _given(self, chat: Chat, field: str, before: Sequence[Turn], turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """Return `turns`, which follow `before`, in the form that the template renders."""
        given, change = adapted(chat, field, [*before, *map(without_nulls, turns)])
        if change and not self.changed:
            self.notes[change] += 1
        self.changed = self.changed or bool(change)
        return given[len(before) :]

    def string(self, field: str, before: _Prompt, text: str) -> Response:
        """Return the encoded response to a plain string or to ids, closed by the end-of-sequence token."""
        tokenizer = _required(field, self.tokenizer)
        end = _end_of_sequence(field, tokenizer)
        if before.text is not None and len(before.text) >= LONG and text.startswith(before.text):
            self.notes["responses that begin with the whole text of their prompt, which then appears twice"] += 1
        if before.text is None:
            ids = _encode_apart(tokenizer, text)
        else:
            ids = self._behind(field, before.text, before.ids[before.num_front :], text)[0]
        if not ids:
            message = f"field {field} has no tokens; must be text that the tokenizer turns into tokens"
            raise BadRecord("empty response", message)
        return Response(ids if ids[-1:] == (end,) else (*ids, end))

    def _behind(self, field: str, prompt: str, prompt_ids: Ids, rest: str) -> tuple[Ids, Callable[[str], Ids]]:
        """Return the ids of `rest` after a prompt, and a function that encodes a prefix of it the same way."""
        tokenizer = _required(field, self.tokenizer)
        whole = _encode(tokenizer, prompt + rest)
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :], lambda start: _encode(tokenizer, prompt + start)[len(prompt_ids) :]
        self.notes["responses tokenised apart from their prompt, because tokens would merge across the border"] += 1
        return _encode_apart(tokenizer, rest), lambda start: _encode_apart(tokenizer, start)


def _encode_answer(answer: tuple[str, Any, Mapping[str, Any]], text: _Text, before: _Prompt) -> Response:
    field, content, extra = answer
    if isinstance(content, Mapping):
        response = Response(tuple(content["ids"]))
    elif before.chat is not None:
        turns = content if isinstance(content, list) else [{"role": "assistant", "content": content}]
        response = text.turns(field, before, turns)
    elif isinstance(content, list):
        allowed = 'a string, because the prompt is not a list of messages such as [{"role": "user", "content": ...}]'
        raise bad_field(field, content, allowed, reason="wrong type")
    else:
        response = text.string(field, before, content)
    logp = extra.get("logp")
    if logp is not None and len(logp) != len(response.ids):
        entry = field.rpartition(".")[0]
        message = f"field {entry}.logp has {len(logp)} values; must be {len(response.ids)}, one for each response token"
        raise BadRecord("logp", message)
    reward = extra.get("reward")
    return Response(
        response.ids,
        reward=None if reward is None else float(reward),
        behaviour_logp=None if logp is None else tuple(map(float, logp)),
        scored=response.scored,
    )


def _scored(ids: Ids, spans: Sequence[Span], rest: str, encode_start: Callable[[str], Ids]) -> tuple[bool, ...]:
    """Return for each token whether it lies in a span; a token across its start does, across its end does not."""

    def tokens_before(position: int) -> int:
        return len(os.path.commonprefix([encode_start(rest[:position]), ids])) if position < len(rest) else len(ids)

    scored = [False] * len(ids)
    for start, end in spans:
        begin, stop = tokens_before(start), tokens_before(end)
        scored[begin:stop] = [True] * max(0, stop - begin)
    return tuple(scored)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> Ids:
    # verbose=False: no warnings about lengths, which data.max_length already limits.
    return tuple(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _encode_apart(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    """Return the ids of text inside a longer text: SentencePiece would add a space at the beginning of a text."""
    for anchor in ANCHORS:
        before, ids = _encode(tokenizer, anchor), _encode(tokenizer, anchor + text)
        if ids[: len(before)] == before:
            return ids[len(before) :]
    return _encode(tokenizer, text)


def _front(tokenizer: PreTrainedTokenizerBase, text: str, bare: Ids) -> Ids:
    """Return the special tokens that the tokenizer adds in front of a text with ids `bare`, not those at its end."""
    framed = _encode(tokenizer, text, special=True)
    for num in range(len(framed) - len(bare) + 1):
        if framed[num : num + len(bare)] == bare:
            return framed[:num]
    return ()


def _end_of_sequence(field: str, tokenizer: PreTrainedTokenizerBase | None) -> int:
    end = _required(field, tokenizer).eos_token_id
    if end is None:
        raise UserError(
            f"field {field} is a plain string, and the tokenizer has no end-of-sequence token to close it; "
            "must be token ids, messages, or a tokenizer with eos_token"
        )
    return int(end)


def _required(field: str, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise UserError(f"field {field} is text, and the model's directory has no tokenizer; must be token ids")
    return tokenizer
