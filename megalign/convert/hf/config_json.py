"""Reads typed fields of a checkpoint's config.json, with errors that name file, field, value and what it must be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megalign.git_lfs import refuse_pointer
from megalign.schema import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`."""
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; a Hugging Face checkpoint directory has it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}; must be a JSON object")
    return value


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """Gives typed access to the fields of a config.json, or of an object inside it."""

    path: Path
    fields: Mapping[str, Any]
    defaults: Mapping[str, Any]
    prefix: str = ""

    def value(self, key: str) -> Any:
        """Return the field as written (null is None), else transformers' default for the family, else None."""
        return self.fields.get(key, self.defaults.get(key))

    def refuse(self, key: str, must_be: str) -> NoReturn:
        """Raise a UserError that names file, field and value and ends with `must_be`."""
        shown = repr(self.value(key))
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise UserError(f"{self.path}: {self.prefix}{key} is {shown}; {must_be}")

    def whole(self, key: str) -> int:
        """Return a whole number >= 1; UserError where the field is missing or another value."""
        value = self.value(key)
        if value is None:
            raise UserError(f"{self.path}: {self.prefix}{key} is missing; must be a whole number")
        if type(value) is not int or value < 1:
            self.refuse(key, "must be a whole number >= 1")
        return value

    def number(self, key: str) -> float:
        """Return a finite number > 0; UserError where the field is missing or another value."""
        value = self.value(key)
        if value is None:
            raise UserError(f"{self.path}: {self.prefix}{key} is missing; must be a number")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self.refuse(key, "must be a number > 0")
        return float(value)

    def flag(self, key: str) -> bool:
        """Return true or false, false where the field is missing; UserError for another value."""
        value = self.value(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            self.refuse(key, "must be true or false")
        return value

    def section(self, key: str) -> ConfigFile:
        """Return the object in a field as a ConfigFile; UserError where it is not an object."""
        value = self.value(key)
        if not isinstance(value, dict):
            self.refuse(key, "must be an object of fields")
        return ConfigFile(self.path, value, {}, f"{self.prefix}{key}.")
