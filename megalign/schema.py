"""What every configuration section and every refusal of bad input is built on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError


class UserError(Exception):
    """The user's input is wrong: the message is the one line shown, and the exit code is 2.

    The message names the file or section, the field, the value that came and what is allowed.
    """


class Strict(BaseModel):
    """A frozen section that refuses unknown keys and wrong types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


def first_problem(error: ValidationError, *, where: str = "") -> str:
    """One line for the first thing pydantic refused: dotted field, value, what is allowed."""
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"]) or "value"
    prefix = f"{where}: " if where else ""
    if problem["type"] == "missing":
        return f"{prefix}{field} is missing; it is required"
    if problem["type"] == "extra_forbidden":
        return f"{prefix}{field} is not a known key"
    message = problem["msg"].removeprefix("Value error, ")
    value = repr(problem["input"])
    return f"{prefix}{field} is {value if len(value) < 80 else value[:77] + '...'}: {message}"
