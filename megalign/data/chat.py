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

from megalign.data.refusals import BadRecord, bad_field
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
INNER = ("name", "arguments")  # the fields of a tool call
# Log notes: how the arguments of tool calls were changed for the template.
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
        """Return `turns` rendered by the template; raise `BadRecord`, naming `field`, if the template fails.

        continued: leave the last turn open, so that the text after it continues it.
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
            raise UserError(f"{where}; must be a Jinja template") from None
        except TemplateError as error:
            message = f"field {field}: the chat template refuses the conversation ({_line(error)})"
            raise BadRecord("chat template", f"{message}; must be a conversation that it accepts") from None
        except Exception as error:  # the template is the model's own program and may fail in any way
            message = f"field {field}: the chat template fails on the conversation ({type(error).__name__}: "
            raise BadRecord("chat template", f"{message}{_line(error)}); must be one that it accepts") from None
        return str(rendered)

    def generation_spans(self, turns: Sequence[Turn]) -> list[tuple[int, int]]:
        """Return the character spans rendered by the template's `{% generation %}` blocks; [] if it has none."""
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
    """Return the chat of a record: its template, tools and variables, checked; `strftime_now` returns `date`."""
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = json.loads(tools)
    variables = {name: value for name, value in (record.get("chat_template_kwargs") or {}).items() if value is not None}
    template = _choose_template(field, tokenizer, variables.pop("chat_template", None), with_tools=bool(tools))
    for name, value in variables.items():
        where = f"chat_template_kwargs.{name}"
        if name in NOT_VARIABLES:
            raise bad_field(where, value, "variables of the chat template", reason="chat template")
        if name not in _variables(template):
            message = f"field {where}: the chat template does not read it; must be a variable that it reads"
            raise BadRecord("chat template", message)
    if tools and "tools" not in _words(template):
        message = "field tools: the chat template does not read them; must be absent for this template"
        raise BadRecord("chat template", message)
    if "strftime_now" in template:
        template = _with_day(template, date or datetime.now().date().isoformat())
    return Chat(tokenizer, template, tools or None, variables)


def template_words(template: Any) -> frozenset[str]:
    """Return every word outside comments in a template, or in all templates of a {name: template} mapping."""
    texts = template.values() if isinstance(template, Mapping) else [template or ""]
    return frozenset().union(*(_words(str(text)) for text in texts))


# Cached: a job has a template or two and may have millions of records.
@lru_cache(maxsize=16)
def _words(template: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", re.sub(r"\{#.*?#\}", "", template, flags=re.S)))


@lru_cache(maxsize=16)
def _variables(template: str) -> Collection[str]:
    """Return the undeclared variables of a template; all its words if Jinja cannot parse it."""
    plain = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template)  # transformers' own tag
    try:
        return find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain))
    except TemplateError:
        return _words(template)


def _choose_template(field: str, tokenizer: PreTrainedTokenizerBase, name: Any, *, with_tools: bool) -> str:
    templates = tokenizer.chat_template
    if not templates:
        raise UserError(
            f"field {field} holds messages, and the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
            "must be plain strings, token ids, or a tokenizer with a chat template"
        )
    if isinstance(templates, str):
        if name is not None:
            allowed = "absent, because the tokenizer has a single chat template"
            raise bad_field("chat_template_kwargs.chat_template", name, allowed, reason="chat template")
        return templates
    if not isinstance(templates, dict) or not all(isinstance(text, str) for text in templates.values()):
        raise UserError(f"{_named(tokenizer)} is a {type(templates).__name__}; must be text, or texts by name")
    names = ", ".join(sorted(templates))
    if name is not None:
        if name not in templates:
            raise bad_field("chat_template_kwargs.chat_template", name, names, reason="chat template")
        return str(templates[name])
    if with_tools and "tool_use" in templates:
        return str(templates["tool_use"])
    if "default" not in templates:
        raise UserError(
            f"field {field} holds messages: {_named(tokenizer)} is a list ({names}) without a default; "
            "must be a template named default, or its name as chat_template_kwargs.chat_template in each record"
        )
    return str(templates["default"])


@lru_cache(maxsize=16)
def _with_day(template: str, date: str) -> str:
    """Return the template with `strftime_now` defined for a fixed date: transformers' own reads the clock."""
    day = datetime.fromisoformat(date)
    pairs = [("%%", "\0")]
    pairs += [(f"%{flag}{code}", day.strftime(f"%{flag}{code}")) for flag in ("", "-") for code in DAY_CODES]
    pairs.append(("\0", "%"))
    filters = "".join(f" | replace({json.dumps(code)}, {json.dumps(value)})" for code, value in pairs)
    # The newline belongs to the macro: Jinja drops the first newline after a block.
    return "{% macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}\n" + template


def without_nulls(turn: Turn) -> dict[str, Any]:
    """Return the turn without null fields and empty tool_calls, as transformers does."""
    return {name: value for name, value in turn.items() if value is not None and (name != "tool_calls" or value)}


def adapted(chat: Chat, field: str, turns: Sequence[Turn]) -> tuple[list[dict[str, Any]], str]:
    """Return the turns in the first form that the template renders correctly, and a note on changed tool arguments.

    Templates differ: some need `function` and `arguments` in each tool call, or `content` in each turn. With
    `arguments | tojson` a JSON string would be quoted a second time; string concatenation fails on an object.
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
        allowed = "an object, or one as JSON text, because the chat template quotes other strings"
        raise bad_field(f"{field}: arguments of tool_calls", quoted, allowed, reason="chat template")
    return plain, ""


def _argument_strings(turns: Sequence[Turn]) -> list[str]:
    calls = [call for turn in turns for call in tool_calls(turn)]
    return [call["arguments"] for call in calls if isinstance(call.get("arguments"), str)]


def tool_calls(turn: Turn) -> list[Mapping[str, Any]]:
    """Return {name, arguments} of each tool call, whether nested under `function` or not."""
    return [call.get("function", call) for call in turn.get("tool_calls") or []]


def _whole_calls(turn: dict[str, Any], change: str) -> dict[str, Any]:
    """Return the turn with `function` and `arguments` in each tool call; change: FROM_TEXT, TO_TEXT or none."""
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
    """Return a copy of the chat without tools."""
    return replace(chat, tools=None)


def append_text(prompt: str, text: str) -> str:
    """Return the generation prompt with text appended; a tag that ends the prompt, such as <think>, is not repeated."""
    opened = OPENED.search(prompt)
    if opened and text.lstrip().startswith(opened[1]):
        return prompt + text.lstrip().removeprefix(opened[1]).removeprefix(opened[2])
    return prompt + text


def _named(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the chat template of {tokenizer.name_or_path!r}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
