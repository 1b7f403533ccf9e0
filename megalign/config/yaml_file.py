"""Read YAML files and `key.sub=value` overrides into a tree of plain values, and record where each key came from."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megalign.schema import UserError, expand_path, reason_of, shorten

COMMAND_LINE = "command line"
NULLS = ("", "null", "Null", "NULL")


class _Loader(yaml.SafeLoader):
    """Loads YAML without Python objects; reads `1e-6` as a number and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise UserError(f"line {line}: key is {shorten(key)}: must be a word")
            if key in seen:
                raise UserError(f"line {line}: key {key} is given twice, first in line {seen[key]}; must be given once")
            seen[key] = line
        return super().construct_mapping(node, deep=deep)


# PyYAML reads YAML 1.1, where 1:30 is 90, 010 is 8, a date is an object and 1e-6 is a string. Here numbers are decimal
# (or 0x, 0o, 0b) with or without an exponent, and dates are text.
REPLACED = ("int", "float", "timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """Return YAML text as plain values; raise UserError with the line if it is invalid."""
    try:
        return yaml.load(text, Loader=_Loader)  # derived from SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{line}not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, KeyError, AttributeError, RecursionError) as error:  # from an invalid tag, or too deep nesting
        raise UserError(f"not valid YAML: {reason_of(error)}") from None


TakesText = Callable[[Sequence[str], Mapping[str, Any]], bool]


@dataclass(frozen=True, slots=True)
class Origins:
    """Records the source of each configuration key, for errors."""

    path: str
    given: set[tuple[str, ...]] = field(default_factory=set)  # keys that overrides set, and sections that they created

    def of(self, keys: Sequence[str]) -> str:
        """Return the source of a key: the command line if it or a section around it was set there, else the file."""
        on_command_line = any(tuple(keys[:depth]) in self.given for depth in range(1, len(keys) + 1))
        return COMMAND_LINE if on_command_line else self.path

    def of_message(self, message: str, tree: dict[str, Any]) -> str:
        """Return the source of the keys that an error message names: its first word, and other dotted words."""
        first, *others = re.findall(r"[a-z_]+(?:\.\w+)+|^\w+", message) or [""]
        if self.of(first.split(".")) == COMMAND_LINE:
            return COMMAND_LINE
        if all(self.of(other.split(".")) == self.path for other in others):
            return self.path
        return f"{COMMAND_LINE} and {self.path}" if _holds(tree, first.split(".")) else COMMAND_LINE


def _holds(tree: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(tree, dict) or key not in tree:
            return False
        tree = tree[key]
    return True


def read_tree(path: str, overrides: Sequence[str], takes_text: TakesText) -> tuple[dict[str, Any], Origins]:
    """Return the file's values with the overrides applied, and the source of each key.

    takes_text(keys, tree): whether an override's value for this key is plain text instead of YAML; the tree is the one
    before the override.
    """
    tree, origins = _read_file(path), Origins(path)
    apply_overrides(tree, overrides, takes_text, origins.given)
    return tree, origins


def apply_overrides(
    tree: dict[str, Any], overrides: Sequence[str], takes_text: TakesText, given: set[tuple[str, ...]]
) -> None:
    """Set `key.sub=value` overrides in a tree, and add the keys that they set or created to `given`."""
    for override in overrides:
        try:
            _apply(tree, override, takes_text, given)
        except UserError as error:
            raise UserError(f"{COMMAND_LINE}: override {override!r}: {error}") from None


def hinted_run_dir(path: str | None, overrides: Sequence[str] = ()) -> str | None:
    """Return `run.dir` of a configuration that may otherwise be invalid; None if it cannot be read.

    path: None where the command line names no file.
    """
    if path is None:
        return None
    try:
        tree = _read_file(path)
    except UserError:
        return None
    for override in overrides:
        with contextlib.suppress(UserError):
            _apply(tree, override, lambda keys, tree: list(keys) == ["run", "dir"], set())
    run = tree.get("run")
    folder = run.get("dir") if isinstance(run, dict) else None
    if not isinstance(folder, str) or not folder:
        return None
    try:
        return expand_path(folder)
    except ValueError:
        return None


def _read_file(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); must be a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; must be a YAML file") from None
    try:
        tree = parse_yaml(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {shorten(tree)}: must be sections such as `run:` and `model:`")
    return tree


def _apply(tree: dict[str, Any], override: str, takes_text: TakesText, given: set[tuple[str, ...]]) -> None:
    """Set one `key.sub=value` in the tree, and add the keys that it set or created to `given`."""
    dotted, equals, text = override.partition("=")
    parts = dotted.split(".")
    if not equals or not all(parts) or any(part != part.strip() for part in parts):
        raise UserError("must look like key.sub=value, without blanks around the dots and before the =")
    value: Any
    if takes_text(parts, tree):
        value = None if text in NULLS else text
    else:
        try:
            value = parse_yaml(text)
        except UserError as error:
            raise UserError(f"value of {dotted}: {error}") from None
    for depth, part in enumerate(parts[:-1], start=1):
        if tree.get(part) is None:
            tree[part] = {}
            given.add(tuple(parts[:depth]))
        tree = tree[part]
        if not isinstance(tree, dict):
            raise UserError(f"{'.'.join(parts[:depth])} is {shorten(tree)}, which has no keys; must be a section")
    tree[parts[-1]] = value
    given.add(tuple(parts))
