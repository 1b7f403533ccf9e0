"""Define the base class of configuration sections, the error for bad input, and how pydantic's errors are shown."""

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
    """Raised for wrong input of the user; its message is shown as one line, and the exit code is 2.

    The message names the file or section, the field, its value and what it must be. Where a run had taken steps, `step`
    is the last of them and `doing` the phase that failed; the exit code is then 1.
    """

    doing: str = ""
    step: int | None = None


def reason_of(error: BaseException) -> str:
    """Return an error's message in at most 200 characters; if torch refused to unpickle a class, only that part."""
    text = " ".join(str(error).split()) or type(error).__name__
    refused = re.search(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) [\w.]+", text)
    return (refused[0] if refused else text)[:200]


class Strict(BaseModel):
    """Base of frozen sections that refuse unknown keys, wrong types, infinities and NaN."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # the string below a field is its description
    )


def expand_path(path: str) -> str:
    """Return the path with a leading `~` or `~user` expanded; raise ValueError if it cannot be a path."""
    if any(ord(character) < 32 for character in path):
        raise ValueError("must be a path without control characters")
    if any(len(name.encode(errors="replace")) > 255 for name in path.split("/")):
        raise ValueError("must be a path of names of up to 255 bytes")
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded == path:
        raise ValueError(f"{path} names no user's home directory; must be a user's, or ./{path} for a file")
    return expanded


def is_local(path: str) -> bool:
    """Tell whether a path that does not exist can only be meant as a local one."""
    return path.startswith(("/", "./", "../", "~")) or ("/" in path and os.path.isdir(os.path.dirname(path)))


def hub_hint(path: str) -> str:
    """Return the end of an error about a missing directory: how to write the model of that name on the Hub.

    Empty for a local path: one that begins as such, or whose parent folder is there.
    """
    if is_local(path):
        return ""
    name = re.fullmatch(r"(?:https?://)?(?:huggingface\.co/|hf:/{0,2})?([\w-][\w.-]*/[\w.-]+(?:@[\w./-]+)?)/?", path)
    return f"; for the model on the Hugging Face Hub: hf://{name[1]}" if name else ""


Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(expand_path)]
# YAML reads `none` as a string, which a path key would silently take as a file name.
NoneWord = BeforeValidator(lambda value: None if value in ("none", "None") else value)


def takes_text(annotation: Any) -> bool:
    """Return whether a key takes only text (or none), so that an override's value is not parsed as YAML."""
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
    """Holds one value that pydantic refused: its keys, and the text of the error."""

    keys: tuple[str, ...]
    kind: Literal["unknown", "missing", "value"]
    text: str

    @property
    def field(self) -> str:
        """Return the dotted name of the field, or `value` for the whole input."""
        return ".".join(self.keys) or "value"


def first_problem(error: ValidationError, *, model: type[BaseModel] | None = None) -> str:
    """Return one line for the first problem that pydantic found: dotted field, value, what it must be."""
    return find_problems(error, model=model)[0].text


def all_problems(problems: Sequence[Problem], source: Callable[[Problem], str] = lambda problem: "") -> str:
    """Return one line for all missing keys and up to five other problems, with a source before its first problem."""
    line, last = "", ""
    others = [problem for problem in problems if problem.kind != "missing"]
    shown = [problem for problem in problems if problem.kind == "missing" or problem in others[:5]]
    for (origin, kind), members in groupby(shown, key=lambda problem: (source(problem), problem.kind)):
        first, *rest = members
        line += ("; " if line else "") + (f"{origin}: " if origin != last else "") + first.text
        if kind == "missing" and rest:
            line += f"; so {'is' if len(rest) == 1 else 'are'} {', '.join(problem.field for problem in rest)}"
        else:
            line += "".join(f"; {problem.text}" for problem in rest)
        last = origin
    return line + (f"; and {len(problems) - len(shown)} more" if len(problems) > len(shown) else "")


def find_problems(error: ValidationError, *, model: type[BaseModel] | None = None, section: str = "") -> list[Problem]:
    """Return every problem that pydantic found: unknown keys first, then missing ones, then values.

    model: the validated class; with it, unknown keys are shown with the known ones, and errors of a union are joined.
    section: dotted prefix of the fields.
    """
    problems: dict[tuple[str, ...], Problem] = {}
    raw = error.errors(include_url=False)
    for problem in raw:
        path, siblings, inner = _locate(problem["loc"], model)
        keys = (*([section] if section else []), *path)
        if keys in problems:
            continue
        field = ".".join(keys) or "value"
        if problem["type"] == "missing":
            problems[keys] = Problem(keys, "missing", f"{field} is missing; it is required")
        elif problem["type"] == "extra_forbidden":
            text = f"{field} is not a known key{allowed_keys(path[-1], siblings, model)}"
            problems[keys] = Problem(keys, "unknown", text)
        elif problem["type"] == "model_type":
            known = f" with keys {', '.join(inner)}" if inner else ""
            problems[keys] = Problem(keys, "value", f"{field} is {shorten(problem['input'])}: must be a section{known}")
        else:
            same_field = [other for other in raw if _locate(other["loc"], model)[0] == path]
            problems[keys] = Problem(keys, "value", f"{field} is {shorten(problem['input'])}: {_allowed(same_field)}")
    return sorted(problems.values(), key=lambda problem: ("unknown", "missing", "value").index(problem.kind))


def _allowed(problems: Sequence[Any]) -> str:
    """Return what the value must be, joined from pydantic's errors about it."""
    messages = [p["msg"].removeprefix("Value error, ").removeprefix("Input should be ") for p in problems]
    must_be = "must be " if problems[0]["msg"].startswith("Input should be ") else ""
    kind, value, hint = problems[0]["type"], problems[0]["input"], ""
    if kind == "string_type" and isinstance(value, int | float):
        hint = f"; as text: '{value}', in quotes"
    elif kind in ("list_type", "tuple_type") and isinstance(value, str | int | float):
        hint = f", as in [{value}]"
    return must_be + " or ".join(dict.fromkeys(messages)) + hint


def shorten(value: Any) -> str:
    """Return a value's repr for an error, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def allowed_keys(key: str, known: Iterable[str], model: type[BaseModel] | None = None) -> str:
    """Return the end of an error about an unknown key: the nearest known key, then all known keys.

    model: the whole configuration, to find a key of that name in another section.
    """
    names = sorted(known)
    elsewhere = [] if model is None else [dotted for dotted in _dotted(model) if dotted.rpartition(".")[2] == key]
    guess = f"; did you mean {' or '.join(elsewhere)}?" if 0 < len(elsewhere) < 3 else did_you_mean(key, names)
    return f"{guess}; must be one of {', '.join(names)}" if names else guess


def did_you_mean(word: str, names: Sequence[str]) -> str:
    """Return "; did you mean NAME?" with the nearest known name; empty if none is near."""
    nearest = nearest_name(word, names)
    return f"; did you mean {nearest}?" if nearest else ""


def nearest_name(word: str, names: Sequence[str]) -> str | None:
    """Return the known name that a word most likely means, such as rank for r, alpha for lora_alpha; else None."""
    # Stricter for short words, which are similar by chance: ppo is not a misspelt dpo.
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.7 if len(word) < 5 else 0.6)
    initials = "".join(part[:1] for part in word.split("_"))
    alike = [name for name in names if name.startswith(word) or word.endswith(f"_{name}") or name == initials]
    return close[0] if close else alike[0] if len(alike) == 1 else None


def _dotted(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys of a configuration."""
    for name, annotation in key_names(model).items():
        section = section_of(annotation)
        yield prefix + name
        if section is not None:
            yield from _dotted(section, f"{prefix}{name}.")


def key_names(model: type[BaseModel]) -> dict[str, Any]:
    """Return {key: annotation} of a section, keys as users write them."""
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section class in an annotation such as ``Section | None`` or ``list[Section]``; else None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for arg in get_args(annotation) if (section := section_of(arg))), None)


def _locate(loc: tuple[int | str, ...], model: type[BaseModel] | None) -> tuple[list[str], list[str], list[str]]:
    """Return (path without pydantic's union tags, known names for its last part, keys of the section it names)."""
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
