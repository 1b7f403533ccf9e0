"""Render conversations with a tokenizer's chat template and the tools, variables and date of one record."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables

from megalign.data.refusals import BadRecord, refuse
from megalign.schema import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = Mapping[str, Any]
OPENED = re.compile(r"(<[A-Za-z][\w:-]*>|\[[A-Z_]+\])(\s*)$")  # <think>, [THINK]; not <|im_start|>
NOT_VARIABLES = (
    *("conversation", "messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "padding"),
    *("truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    *("sanitize_control_tokens", "strftime_now", "raise_exception"),
)
INNER = ("name", "arguments")  # of a call
# How the arguments of calls are changed for a template, for a log.
FROM_TEXT = "records whose tool-call arguments were read from JSON strings, which the template quotes"
TO_TEXT = "records whose tool-call arguments were written as JSON strings, because the template takes no objects"
DAY_CODES = "aAbBcCdDeFgGhHIjkmMpPrRSTuUVwWxXyYzZ"


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat template with the tools and variables of one record."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    tools: list[dict[str, Any]] | None
    variables: Mapping[str, Any]

    def text(
        self, field: str, turns: Sequence[Turn], *, generation_prompt: bool = False, continued: bool = False
    ) -> str:
        """Render `turns`; an error inside the template is a bad record that names `field`.

        continued: the last turn stays open, so that what follows continues it.
        """
        try:
            rendered = self.tokenizer.apply_chat_template(
                [dict(turn) for turn in turns],
                tools=self.tools,
                chat_template=self.template,
                add_generation_prompt=generation_prompt,
                continue_final_message=continued,
                tokenize=False,
                **self.variables,
            )
        except TemplateSyntaxError as error:
            where = f"{_named(self.tokenizer)} is not valid (line {error.lineno}: {_line(error)})"
            raise UserError(f"{where}; allowed: a Jinja template") from None
        except TemplateError as error:
            message = f"field {field}: the chat template refuses the conversation ({_line(error)})"
            raise BadRecord("chat template", f"{message}; allowed: what it takes") from None
        except Exception as error:  # the template is the model's own program and may fail in any way
            message = f"field {field}: the chat template fails on the conversation ({type(error).__name__}: "
            raise BadRecord("chat template", f"{message}{_line(error)}); allowed: what it takes") from None
        return str(rendered)

    def generation_spans(self, turns: Sequence[Turn]) -> list[tuple[int, int]]:
        """Return the characters that `{% generation %}` blocks of the template wrote; none where it has no blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        if not re.search(r"\{%[-+]?\s*generation\b", self.template):
            return []
        _, spans = render_jinja_template(
            conversations=[[dict(turn) for turn in turns]],
            tools=self.tools,
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.variables},
        )
        return [(start, end) for start, end in spans[0]]


def open_chat(
    field: str, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, date: str | None = None
) -> Chat:
    """Choose the template and check the record's tools and variables; `strftime_now` returns `date`."""
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = json.loads(tools)
    variables = {name: value for name, value in (record.get("chat_template_kwargs") or {}).items() if value is not None}
    template = _choose_template(field, tokenizer, variables.pop("chat_template", None), with_tools=bool(tools))
    for name, value in variables.items():
        where = f"chat_template_kwargs.{name}"
        if name in NOT_VARIABLES:
            raise refuse(where, value, "variables of the chat template", reason="chat template")
        if name not in _variables(template):
            message = f"field {where}: the chat template does not read it; allowed: variables that it reads"
            raise BadRecord("chat template", message)
    if tools and "tools" not in _words(template):
        message = "field tools: the chat template does not read them; allowed: a model whose template takes tools"
        raise BadRecord("chat template", message)
    if "strftime_now" in template:
        template = _with_day(template, date or datetime.now().date().isoformat())
    return Chat(tokenizer, template, tools or None, variables)


def template_words(template: Any) -> frozenset[str]:
    """Return every name and word that a template, or any of a list of templates, holds outside comments."""
    texts = template.values() if isinstance(template, Mapping) else [template or ""]
    return frozenset().union(*(_words(str(text)) for text in texts))


# A job has a template or two and may have millions of records.
@lru_cache(maxsize=16)
def _words(template: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", re.sub(r"\{#.*?#\}", "", template, flags=re.S)))


@lru_cache(maxsize=16)
def _variables(template: str) -> Collection[str]:
    """Return the variables that a template reads without setting them; all its words if it does not parse."""
    plain = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template)  # a tag of transformers' own
    try:
        return find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain))
    except TemplateError:
        return _words(template)


def _choose_template(field: str, tokenizer: PreTrainedTokenizerBase, name: Any, *, with_tools: bool) -> str:
    templates = tokenizer.chat_template
    if not templates:
        raise UserError(
            f"field {field} holds messages, and the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
            "allowed: plain strings, token ids, or a tokenizer with a chat template"
        )
    if isinstance(templates, str):
        if name is not None:
            allowed = "nothing, because the tokenizer has one chat template"
            raise refuse("chat_template_kwargs.chat_template", name, allowed, reason="chat template")
        return templates
    if not isinstance(templates, dict) or not all(isinstance(text, str) for text in templates.values()):
        raise UserError(f"{_named(tokenizer)} is a {type(templates).__name__}; allowed: text, or texts by name")
    names = ", ".join(sorted(templates))
    if name is not None:
        if name not in templates:
            raise refuse("chat_template_kwargs.chat_template", name, names, reason="chat template")
        return str(templates[name])
    if with_tools and "tool_use" in templates:
        return str(templates["tool_use"])
    if "default" not in templates:
        raise UserError(
            f"field {field} holds messages: {_named(tokenizer)} is a list ({names}) without a default; "
            "allowed: a template named default, or its name as chat_template_kwargs.chat_template in each record"
        )
    return str(templates["default"])


@lru_cache(maxsize=16)
def _with_day(template: str, date: str) -> str:
    """Define `strftime_now` in front of the template: transformers' own reads the clock at each call."""
    day = datetime.fromisoformat(date)
    pairs = [("%%", "\0")]
    pairs += [(f"%{flag}{code}", day.strftime(f"%{flag}{code}")) for flag in ("", "-") for code in DAY_CODES]
    pairs.append(("\0", "%"))
    filters = "".join(f" | replace({json.dumps(code)}, {json.dumps(value)})" for code, value in pairs)
    # The newline belongs to the macro: jinja drops the first one behind a block.
    return "{% macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}\n" + template


def without_nulls(turn: Turn) -> dict[str, Any]:
    """Return the turn without null fields and empty tool_calls, as transformers does."""
    return {name: value for name, value in turn.items() if value is not None and (name != "tool_calls" or value)}


def adapted(chat: Chat, field: str, turns: Sequence[Turn]) -> tuple[list[dict[str, Any]], str]:
    """Return the turns in the first form that the template takes, and how tool arguments had to be changed for it.

    Templates differ: some take no call without `function` or `arguments`, or no turn without `content`; one that
    writes `arguments | tojson` would quote a string of JSON, and one that joins strings takes no object.
    """
    plain = [dict(turn) for turn in turns]
    forms = [(plain, "")]
    for change in ("", FROM_TEXT, TO_TEXT):
        form = [_whole_calls(turn, change) for turn in plain]
        if all(form != other for other, _ in forms):
            forms.append((form, change))
    if any("content" not in turn for turn in plain):
        forms += [([{"content": "", **turn} for turn in form], change) for form, change in forms]
    quoted = None
    for form, change in forms if len(forms) > 1 else []:
        with contextlib.suppress(BadRecord):
            rendered = chat.text(field, form)
            texts = [text for text in _argument_strings(form) if json.dumps(text, ensure_ascii=False) in rendered]
            if not texts:
                return form, change
            quoted = next(filter(None, texts), quoted)
    if quoted is not None:
        allowed = "an object, or one as JSON text, because the chat template quotes what is none"
        raise refuse(f"{field}: arguments of tool_calls", quoted, allowed, reason="chat template")
    return plain, ""


def _argument_strings(turns: Sequence[Turn]) -> list[str]:
    calls = [call for turn in turns for call in tool_calls(turn)]
    return [call["arguments"] for call in calls if isinstance(call.get("arguments"), str)]


def tool_calls(turn: Turn) -> list[Mapping[str, Any]]:
    """Return name and arguments of each call, wherever the record's style keeps them."""
    return [call.get("function", call) for call in turn.get("tool_calls") or []]


def _whole_calls(turn: dict[str, Any], change: str) -> dict[str, Any]:
    """Return the turn with `function` and `arguments` in each call, the arguments changed as said."""
    if "tool_calls" not in turn:
        return turn
    calls = []
    for call in turn["tool_calls"]:
        inner = {"arguments": {}, **call.get("function", {name: call[name] for name in call if name in INNER})}
        if change == TO_TEXT and not isinstance(inner["arguments"], str):
            inner["arguments"] = json.dumps(inner["arguments"], ensure_ascii=False)
        if change == FROM_TEXT and isinstance(inner["arguments"], str):
            with contextlib.suppress(ValueError):
                value = json.loads(inner["arguments"] or "{}")
                inner["arguments"] = value if isinstance(value, dict) else inner["arguments"]
        outer = {name: value for name, value in call.items() if name not in ("function", *INNER)}
        calls.append({"type": "function", **outer, "function": inner})
    return {**turn, "tool_calls": calls}


def without_tools(chat: Chat) -> Chat:
    """Return the chat without tools."""
    return replace(chat, tools=None)


def behind(prompt: str, text: str) -> str:
    """Append text to a generation prompt; a tag that the prompt ends with, such as <think>, is not opened twice."""
    opened = OPENED.search(prompt)
    if opened and text.lstrip().startswith(opened[1]):
        return prompt + text.lstrip().removeprefix(opened[1]).removeprefix(opened[2])
    return prompt + text


def _named(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the chat template of {tokenizer.name_or_path!r}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
