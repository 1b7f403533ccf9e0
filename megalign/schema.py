"""What every configuration section and every refusal of bad input is built on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError


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


def first_problem(
    error: ValidationError, *, where: str = "", model: type[BaseModel] | None = None, section: str = ""
) -> str:
    """One line for the first thing pydantic refused: dotted field, value, what is allowed.

    model: the class that was validated; with it an unknown key comes with the known ones and a union speaks as one.
    section: dotted prefix of the fields.
    """
    problems = error.errors(include_url=False)
    problem = problems[0]
    path, siblings, inner = _locate(problem["loc"], model)
    field = ".".join(([section] if section else []) + path) or "value"
    prefix = f"{where}: " if where else ""
    if problem["type"] == "missing":
        return f"{prefix}{field} is missing; it is required"
    if problem["type"] == "extra_forbidden":
        return f"{prefix}{field} is not a known key{allowed_keys(path[-1], siblings)}"
    if problem["type"] == "model_type":
        known = f" with keys {', '.join(inner)}" if inner else ""
        return f"{prefix}{field} is {shorten(problem['input'])}: must be a section{known}"
    same_field = [p["msg"] for p in problems if _locate(p["loc"], model)[0] == path]
    messages = [m.removeprefix("Value error, ").removeprefix("Input should be ") for m in same_field]
    must_be = "must be " if problem["msg"].startswith("Input should be ") else ""
    return f"{prefix}{field} is {shorten(problem['input'])}: {must_be}{' or '.join(dict.fromkeys(messages))}"


def shorten(value: Any) -> str:
    """`value` as it is shown in an error: one line, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def allowed_keys(key: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown key: the nearest known one, then all of them."""
    names = sorted(known)
    nearest = difflib.get_close_matches(key, names, n=1)
    guess = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"{guess}; known: {', '.join(names)}" if names else ""


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
