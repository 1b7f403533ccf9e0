"""What every configuration section and every refusal of bad input is built on."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError


class UserError(Exception):
    """The user's input is wrong: the message is the one line shown, and the exit code is 2.

    The message names the file or section, the field, the value that came and what is allowed.
    """


def reason_of(error: BaseException) -> str:
    """Why something failed, in a line of 200 characters; of torch's refusals of pickles what matters."""
    text = " ".join(str(error).split()) or type(error).__name__
    found = re.search(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) [\w.]+", text)
    return (found[0] if found else text)[:200]


class Strict(BaseModel):
    """A frozen section that refuses unknown keys, wrong types, infinities and NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


def expand_path(path: str) -> str:
    """Replace a leading `~` or `~user` by that home directory; ValueError for what cannot be a path."""
    if any(ord(character) < 32 for character in path):
        raise ValueError("must be a path without control characters")
    if any(len(name.encode(errors="replace")) > 255 for name in path.split("/")):
        raise ValueError("must be a path of names of up to 255 bytes")
    if not path.startswith("~"):
        return path
    found = os.path.expanduser(path)
    if found == path:
        raise ValueError(f"{path} names no user's home directory; must be one, or ./{path} for that very name")
    return found


def hub_hint(path: str) -> str:
    """The end of an error about a directory that is not there: how the model of that name on the Hub is written."""
    name = re.fullmatch(r"(?:https?://)?(?:huggingface\.co/|hf:/{0,2})?([\w-][\w.-]*/[\w.-]+(?:@[\w./-]+)?)/?", path)
    return f"; for the model on the Hugging Face Hub: hf://{name[1]}" if name else ""


Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(expand_path)]
# YAML reads `none` as a word; where a key is otherwise text it would silently become a file of that name.
NoneWord = BeforeValidator(lambda value: None if value in ("none", "None") else value)


def takes_text(annotation: Any) -> bool:
    """Whether a key's value can only be text (or nothing), so that an override's value is taken as it stands."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return takes_text(parts[0])
    if origin in (Union, UnionType):
        return all(part is NoneType or takes_text(part) for part in parts)
    if origin is Literal:
        return all(isinstance(part, str) for part in parts)
    return annotation is str


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that pydantic refused: where it stands, and what is told of it."""

    keys: tuple[str, ...]
    kind: Literal["unknown", "missing", "value"]
    text: str

    @property
    def field(self) -> str:
        return ".".join(self.keys) or "value"


def first_problem(error: ValidationError, *, model: type[BaseModel] | None = None) -> str:
    """One line for the most telling thing pydantic refused: dotted field, value, what is allowed."""
    return find_problems(error, model=model)[0].text


def all_problems(problems: Sequence[Problem], source: Callable[[Problem], str] = lambda problem: "") -> str:
    """One line for all missing keys and five other problems, each behind its source unless the one before has it."""
    line, last = "", ""
    others = [problem for problem in problems if problem.kind != "missing"]
    shown = [problem for problem in problems if problem.kind == "missing" or problem in others[:5]]
    for (origin, kind), members in groupby(shown, key=lambda one: (source(one), one.kind)):
        first, *rest = members
        line += ("; " if line else "") + (f"{origin}: " if origin != last else "") + first.text
        if kind == "missing" and rest:
            line += f"; so {'is' if len(rest) == 1 else 'are'} {', '.join(one.field for one in rest)}"
        else:
            line += "".join(f"; {one.text}" for one in rest)
        last = origin
    return line + (f"; and {len(problems) - len(shown)} more" if len(problems) > len(shown) else "")


def find_problems(error: ValidationError, *, model: type[BaseModel] | None = None, section: str = "") -> list[Problem]:
    """Everything pydantic refused: unknown keys first, then missing ones, then values.

    model: the class that was validated; with it an unknown key comes with the known ones and a union speaks as one.
    section: dotted prefix of the fields.
    """
    found: dict[tuple[str, ...], Problem] = {}
    raw = error.errors(include_url=False)
    for problem in raw:
        path, siblings, inner = _locate(problem["loc"], model)
        keys = (*([section] if section else []), *path)
        if keys in found:
            continue
        field = ".".join(keys) or "value"
        if problem["type"] == "missing":
            found[keys] = Problem(keys, "missing", f"{field} is missing; it is required")
        elif problem["type"] == "extra_forbidden":
            text = f"{field} is not a known key{allowed_keys(path[-1], siblings, model)}"
            found[keys] = Problem(keys, "unknown", text)
        elif problem["type"] == "model_type":
            known = f" with keys {', '.join(inner)}" if inner else ""
            found[keys] = Problem(keys, "value", f"{field} is {shorten(problem['input'])}: must be a section{known}")
        else:
            same_field = [other for other in raw if _locate(other["loc"], model)[0] == path]
            found[keys] = Problem(keys, "value", f"{field} is {shorten(problem['input'])}: {_allowed(same_field)}")
    return sorted(found.values(), key=lambda one: ("unknown", "missing", "value").index(one.kind))


def _allowed(problems: Sequence[Any]) -> str:
    """What the refusals of one value say is allowed."""
    messages = [p["msg"].removeprefix("Value error, ").removeprefix("Input should be ") for p in problems]
    must_be = "must be " if problems[0]["msg"].startswith("Input should be ") else ""
    kind, value, hint = problems[0]["type"], problems[0]["input"], ""
    if kind == "string_type" and isinstance(value, int | float):
        hint = f"; as text: '{value}', in quotes"
    elif kind in ("list_type", "tuple_type") and isinstance(value, str | int | float):
        hint = f", as in [{value}]"
    return must_be + " or ".join(dict.fromkeys(messages)) + hint


def shorten(value: Any) -> str:
    """`value` as it is shown in an error: one line, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def allowed_keys(key: str, known: Iterable[str], model: type[BaseModel] | None = None) -> str:
    """The end of an error about an unknown key: the nearest known one, then all of them.

    model: whose other sections may hold a key of that very name.
    """
    names = sorted(known)
    elsewhere = [] if model is None else [dotted for dotted in _dotted(model) if dotted.rpartition(".")[2] == key]
    nearest = elsewhere if 0 < len(elsewhere) < 3 else _nearest(key, names)
    guess = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
    return f"{guess}; known: {', '.join(names)}" if names else guess


def _nearest(key: str, names: Sequence[str]) -> list[str]:
    """The one name that a mistyped or otherwise known key stands for: r for rank, lora_alpha for alpha."""
    close = difflib.get_close_matches(key, names, n=1)
    initials = "".join(word[:1] for word in key.split("_"))
    alike = [name for name in names if name.startswith(key) or key.endswith(f"_{name}") or name == initials]
    return close or (alike if len(alike) == 1 else [])


def _dotted(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a configuration, with its sections before it."""
    for name, annotation in key_names(model).items():
        section = section_of(annotation)
        yield prefix + name
        if section is not None:
            yield from _dotted(section, f"{prefix}{name}.")


def key_names(model: type[BaseModel]) -> dict[str, Any]:
    """A section's keys as users write them, with their annotations."""
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as ``Section | None`` or ``list[Section]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := section_of(arg))), None)


def _locate(loc: tuple[int | str, ...], model: type[BaseModel] | None) -> tuple[list[str], list[str], list[str]]:
    """(path without pydantic's union tags, known names for its last part, keys of the section it names)."""
    if model is None:
        return [str(part) for part in loc], [], []
    path: list[str] = []
    section: type[BaseModel] | None = model
    siblings: list[str] = []
    for part in loc:
        if isinstance(part, str) and section is None:
            continue
        path.append(str(part))
        if isinstance(part, str) and section is not None:
            keys = key_names(section)
            siblings = list(keys)
            section = section_of(keys.get(part))
    return path, siblings, list(key_names(section)) if section else []
