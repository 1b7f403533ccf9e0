"""Typed reading of a checkpoint's config.json, with refusals that name file, field, value and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megalign.convert.pointers import refuse_pointer
from megalign.schema import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; a Hugging Face checkpoint directory has it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}; a JSON object is needed")
    return value


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The fields of one config.json, or of an object in it."""

    path: Path
    fields: Mapping[str, Any]
    defaults: Mapping[str, Any]
    prefix: str = ""

    def value(self, key: str) -> Any:
        """The field as written (null is None), else transformers' default for the family, else None."""
        return self.fields.get(key, self.defaults.get(key))

    def refuse(self, key: str, allowed: str) -> NoReturn:
        shown = repr(self.value(key))
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise UserError(f"{self.path}: {self.prefix}{key} is {shown}; {allowed}")

    def whole(self, key: str) -> int:
        value = self.value(key)
        if value is None:
            raise UserError(f"{self.path}: {self.prefix}{key} is missing; a whole number is needed")
        if type(value) is not int or value < 1:
            self.refuse(key, "allowed: a whole number >= 1")
        return value

    def number(self, key: str) -> float:
        value = self.value(key)
        if value is None:
            raise UserError(f"{self.path}: {self.prefix}{key} is missing; a number is needed")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self.refuse(key, "allowed: a number > 0")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.value(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            self.refuse(key, "allowed: true, false")
        return value

    def section(self, key: str) -> ConfigFile:
        value = self.value(key)
        if not isinstance(value, dict):
            self.refuse(key, "allowed: an object of fields")
        return ConfigFile(self.path, value, {}, f"{self.prefix}{key}.")
