"""YAML files and `key.sub=value` overrides as a tree of plain values; nothing here knows what a key means."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megalign.schema import UserError, shorten


class _Loader(yaml.SafeLoader):
    """YAML without objects; `1e-6` is a number and a key may come once."""

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


# YAML 1.1, which PyYAML reads, wants a dot and a signed exponent in a float and takes 1e-6 for a word.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Plain values; bad YAML is a UserError that gives the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{line}not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}") from None


def read_tree(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The file's values with the overrides on top."""
    tree = _read_file(path)
    for override in overrides:
        _apply(tree, override)
    return tree


def hinted_run_dir(path: str, overrides: Sequence[str] = ()) -> str | None:
    """`run.dir` of a configuration that need not be right otherwise; None where it cannot be told."""
    try:
        tree = _read_file(path)
    except UserError:
        return None
    for override in overrides:
        with contextlib.suppress(UserError):
            _apply(tree, override)
    run = tree.get("run")
    folder = run.get("dir") if isinstance(run, dict) else None
    return folder if isinstance(folder, str) and folder else None


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


def _apply(tree: dict[str, Any], override: str) -> None:
    """Put one `key.sub=value` into the tree."""
    dotted, equals, text = override.partition("=")
    parts = dotted.split(".")
    if not equals or not all(parts):
        raise UserError(f"override {override!r}: must look like key.sub=value")
    try:
        value = parse_yaml(text)
    except UserError as error:
        raise UserError(f"override {override!r}: value of {dotted}: {error}") from None
    for depth, part in enumerate(parts[:-1], start=1):
        if tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {'.'.join(parts[:depth])} is {shorten(tree)}, which has no keys")
    tree[parts[-1]] = value
