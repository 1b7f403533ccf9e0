"""Text to token ids, one way for every loss.

Plain strings never pass through a chat template: prompt and response are tokenised apart, no start token is added,
the end-of-sequence token closes the response. Messages get the template's own tokens and nothing more: the prompt is
template(turns before the answer, with the generation prompt), the response is what template(all turns) adds to it.
Ids are taken as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from megalign.data.group import Group, Response
from megalign.data.records import BadRecord, detect_format, refuse
from megalign.schema import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = Mapping[str, str]
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TextOptions:
    """Settings of `data` that change what text becomes which tokens."""

    special_tokens: Literal["auto", "none"] = "auto"  # around plain strings: the tokenizer's own, or none
    date: str | None = None  # YYYY-MM-DD that chat templates take for today; None: the day of the call


DEFAULT = TextOptions()


def encode_record(
    record: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    format: str,
    train_on: str = "last_assistant",
    options: TextOptions = DEFAULT,
    notes: Counter[str] | None = None,
) -> tuple[Ids, tuple[Response, ...]]:
    """Return prompt ids and the responses in file order of a record that `check_record` let pass as `format`.

    notes: counts what was decided about the text and a log should tell.
    """
    if format == "messages":
        turns = record["messages"]
        first = len(turns) - 1
        if train_on == "all_assistant":
            first = next(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
        prompt_ids, response = _encode_turns("messages", turns[:first], turns[first:], tokenizer, num_before=first)
        return prompt_ids, (response,)
    prompt, answers = _split(record, format)
    prompt_ids = _encode_prompt(prompt, tokenizer)
    return prompt_ids, tuple(_encode_answer(answer, prompt, prompt_ids, tokenizer) for answer in answers)


def token_fields(record: Mapping[str, Any], format: str) -> list[str]:
    """Which field the prompt's ids came from, then each response's, for messages."""
    if format == "messages":
        return ["messages", "messages"]
    prompt = next((field for field in ("prompt_ids", "prompt") if field in record), "chosen")
    return [prompt, *(field for field, _, _ in _split(record, format)[1])]


def encode_prompt(
    record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, *, options: TextOptions = DEFAULT
) -> Ids:
    """Return the ids that a response to the record's `prompt` (text, messages) or `prompt_ids` is sampled from."""
    prompt = {"ids": record["prompt_ids"]} if "prompt_ids" in record else record["prompt"]
    return _encode_prompt(prompt, tokenizer)


def _encode_prompt(prompt: Any, tokenizer: PreTrainedTokenizerBase | None) -> Ids:
    """Ids of a string, of messages (with the generation prompt), or `{"ids": [...]}` as they are."""
    if isinstance(prompt, Mapping):
        return tuple(prompt["ids"])
    if isinstance(prompt, str):
        return _encode_string("prompt", prompt, tokenizer)
    return _apply_template("prompt", prompt, tokenizer, add_generation_prompt=True)


def retokenize(
    group: Group,
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str = "auto",
    train_on: str = "last_assistant",
    origin: str = "",
    options: TextOptions = DEFAULT,
) -> tuple[Ids, Response]:
    """The record's single response under another model's tokenizer and chat template, for teachers."""
    where = origin or f"record {group.record}"
    name = detect_format(group.raw) if format == "auto" else format
    ids = [field for field in ("prompt_ids", "response_ids") if field in group.raw]
    ids += ["responses[0].response_ids" for entry in group.raw.get("responses", [])[:1] if "response_ids" in entry]
    if ids:
        raise UserError(
            f"{where}: field {ids[0]} holds token ids, and a teacher with another tokenizer needs text; "
            "allowed: messages, prompt with completion, or teacher_scores in the record"
        )
    try:
        prompt_ids, responses = encode_record(group.raw, tokenizer, format=name, train_on=train_on, options=options)
    except BadRecord as error:
        raise UserError(f"{where}: under the teacher's tokenizer: {error}") from None
    if not prompt_ids:
        raise UserError(f"{where}: field prompt has no tokens under the teacher's tokenizer; allowed: one or more")
    return prompt_ids, responses[0]


def _split(record: Mapping[str, Any], format: str) -> tuple[Any, list[tuple[str, Any, Mapping[str, Any]]]]:
    """The prompt, and (field, text or {"ids"}, what else is said of it) of each response."""
    prompt = {"ids": record["prompt_ids"]} if "prompt_ids" in record else record.get("prompt")
    if format == "responses":
        return prompt, [
            (f"responses[{place}].{'response_ids' if 'response_ids' in entry else 'text'}", _content(entry), entry)
            for place, entry in enumerate(record["responses"])
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
    """The messages both sides begin with are the prompt."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    allowed = "chosen and rejected begin with the same messages and end with different answers (or a prompt field)"
    if shared == 0:
        raise refuse("chosen[0]", chosen[0], allowed, reason="implicit prompt")
    texts = {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    for side, turns in texts.items():
        if not turns or turns[0]["role"] != "assistant":
            raise refuse(side, turns, allowed, reason="implicit prompt")
    return chosen[:shared], texts


def _encode_answer(
    answer: tuple[str, Any, Mapping[str, Any]],
    prompt: Any,
    prompt_ids: Ids,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Response:
    field, content, extra = answer
    if isinstance(content, Mapping):
        response = Response(tuple(content["ids"]))
    elif isinstance(prompt, list):
        turns = content if isinstance(content, list) else [{"role": "assistant", "content": content}]
        response = _encode_turns(field, prompt, turns, tokenizer, prompt_ids=prompt_ids)[1]
    elif isinstance(content, list):
        raise refuse(field, content, "a string, because the prompt is not a list of messages", reason="wrong type")
    else:
        response = Response(_encode_string(field, content, tokenizer) + (_end_of_sequence(field, tokenizer),))
    logp = extra.get("logp")
    if logp is not None and len(logp) != len(response.ids):
        place = field.rpartition(".")[0]
        message = (
            f"field {place}.logp has {len(logp)} values; allowed: {len(response.ids)}, one for each response token"
        )
        raise BadRecord("logp", message)
    reward = extra.get("reward")
    return Response(
        response.ids,
        reward=None if reward is None else float(reward),
        behaviour_logp=None if logp is None else tuple(map(float, logp)),
        scored=response.scored,
    )


def _encode_turns(
    field: str,
    before: Sequence[Turn],
    answer: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    prompt_ids: Ids | None = None,
    num_before: int = 0,
) -> tuple[Ids, Response]:
    """Prompt ids, and what the template adds for the answer; of several turns only the assistant's are scored."""
    for place, turn in enumerate(answer, start=num_before):
        if turn["role"] == "assistant" and not turn["content"]:
            raise refuse(f"{field}[{place}].content", "", "a string that is not empty", reason="empty response")
    turns = [*before, *answer]
    if prompt_ids is None:
        prompt_ids = _apply_template(field, before, tokenizer, add_generation_prompt=True)
    all_ids = _apply_template(field, turns, tokenizer)
    _check_prefix(field, prompt_ids, all_ids)
    ids = all_ids[len(prompt_ids) :]
    if len(answer) == 1:
        return prompt_ids, Response(ids)
    scored = [False] * len(ids)
    for place in range(len(before), len(turns)):
        if turns[place]["role"] != "assistant":
            continue
        opened = _apply_template(field, turns[:place], tokenizer, add_generation_prompt=True)
        closed = _apply_template(field, turns[: place + 1], tokenizer)
        _check_prefix(field, opened, closed)
        _check_prefix(field, closed, all_ids)
        for position in range(len(opened), len(closed)):
            scored[position - len(prompt_ids)] = True
    return prompt_ids, Response(ids, scored=tuple(scored))


def _check_prefix(field: str, prefix: Ids, whole: Ids) -> None:
    if whole[: len(prefix)] != prefix:
        message = (
            f"field {field}: the chat template writes earlier turns otherwise once an answer follows; "
            "allowed: conversations whose beginning it leaves as it is"
        )
        raise BadRecord("chat template", message)


def _apply_template(
    field: str,
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    add_generation_prompt: bool = False,
) -> Ids:
    tokenizer = _required(field, tokenizer)
    if not tokenizer.chat_template:
        raise UserError(
            f"field {field} holds messages, and the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
            "allowed: plain strings, token ids, or a tokenizer with a chat template"
        )
    plain = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    try:
        ids = tokenizer.apply_chat_template(
            plain, tokenize=True, return_dict=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        message = f"field {field}: the chat template refuses the conversation ({error}); allowed: what it takes"
        raise BadRecord("chat template", message) from None
    return tuple(ids)


def _encode_string(field: str, text: str, tokenizer: PreTrainedTokenizerBase | None) -> Ids:
    # verbose=False: without it the tokenizer warns of lengths that max_length already rules.
    return tuple(_required(field, tokenizer)(text, add_special_tokens=False, verbose=False)["input_ids"])


def _end_of_sequence(field: str, tokenizer: PreTrainedTokenizerBase | None) -> int:
    end = _required(field, tokenizer).eos_token_id
    if end is None:
        raise UserError(
            f"field {field} is a plain string, and the tokenizer has no end-of-sequence token to close it with; "
            "allowed: token ids, messages, or a tokenizer with eos_token"
        )
    return int(end)


def _required(field: str, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise UserError(f"field {field} is text, and the model's directory has no tokenizer; allowed: token ids")
    return tokenizer
