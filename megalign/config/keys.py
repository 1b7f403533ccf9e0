"""Describe every key of a configuration: its type, its default and its description."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megalign.config.job import JobConfig
from megalign.config.sections import SECTIONS
from megalign.losses.base import LOSSES, Loss, LossConfig, find_loss
from megalign.schema import UserError, did_you_mean, expand_path, section_of

BOUNDS = {Gt: (">", "gt"), Ge: (">=", "ge"), Lt: ("<", "lt"), Le: ("<=", "le")}
WORDS = {int: "whole number", float: "number", bool: "true | false", str: "text", dict: "settings", NoneType: "none"}


@dataclass(frozen=True, slots=True)
class Key:
    """Describes one key by its dotted name; `default` is a YAML value, or `required`."""

    name: str
    type: str
    default: str
    about: str


@dataclass(frozen=True, slots=True)
class Section:
    """Groups the keys of one section of the configuration, or of one loss."""

    title: str
    about: str
    keys: tuple[Key, ...]


def all_sections() -> list[Section]:
    """Return every section in configuration order; `loss` is followed by one section per built-in loss."""
    sections: list[Section] = []
    for name, about in SECTIONS.items():
        keys = _field_keys(name, JobConfig.model_fields[name])
        sections.append(Section(name, about, tuple(keys)))
        if name == "loss":
            sections += [_loss_section(loss, loss_name) for loss_name, loss in sorted(LOSSES.items())]
    return sections


def find_sections(name: str) -> list[Section]:
    """Return the sections for a name: of a section, a dotted key, a loss, or a user's loss as `module:function`."""
    if ":" in name:
        return [_loss_section(find_loss(name), name)]
    sections, name = all_sections(), _plain(name)
    if name in LOSSES:
        return [section for section in sections if section.title == f"loss {name}"]
    if name == "loss":
        return [section for section in sections if section.title.split()[0] == name]
    inside = [
        Section(section.title, section.about, keys)
        for section in sections
        if (keys := tuple(key for key in section.keys if f"{_plain(key.name)}.".startswith(f"{name}.")))
    ]
    if not inside:
        names = {_plain(key.name) for section in sections for key in section.keys}
        alike = [key for key in sorted(names) if key.endswith(f".{name}")]
        guess = f"; did you mean {' or '.join(alike)}?" if alike else did_you_mean(name, [*SECTIONS, *LOSSES, *names])
        raise UserError(
            f"command line: key or section is {name!r}{guess}; must be one of {', '.join(SECTIONS)}, "
            f"a key, or a loss: {', '.join(sorted(LOSSES))}"
        )
    return inside


def _plain(name: str) -> str:
    return name.replace("[]", "")


def _loss_section(loss: Loss, name: str) -> Section:
    """Return the keys of one loss besides its name, under the first sentence of its module, or of its function."""
    texts = (sys.modules[loss.function.__module__].__doc__ if name in LOSSES else "", loss.function.__doc__)
    first = next((text for text in texts if text), "").split("\n\n")[0]
    about = " ".join(first.split()).partition(". ")[0].removesuffix(".")
    return Section(f"loss {name}", about, tuple(_model_keys("loss.", loss.config, leave_out=LossConfig)))


def _model_keys(prefix: str, model: type[BaseModel], *, leave_out: type[BaseModel] | None = None) -> Iterator[Key]:
    """Yield the keys of a section class in order, without those of `leave_out`."""
    for name, field in model.model_fields.items():
        if leave_out is None or name not in leave_out.model_fields:
            yield from _field_keys(prefix + (field.alias or name), field)


def _field_keys(name: str, field: FieldInfo) -> Iterator[Key]:
    """Yield a key, or the keys inside if it is a section; the name of a list of sections ends with `[]`."""
    section = section_of(field.annotation)
    if section is not None:
        yield from _model_keys(f"{name}{'[]' if _is_list(field.annotation) else ''}.", section)
        return
    about = " ".join((field.description or SECTIONS.get(name, "")).split())
    yield Key(name, type_text(field.annotation, field.metadata), _default_text(field), about)


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(_is_list(part) for part in get_args(annotation))


def _default_text(field: FieldInfo) -> str:
    if field.is_required() or field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, str):
        return field.default
    return "none" if field.default is None else json.dumps(field.default)


def type_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return a key's type as text, such as `whole number > 0`, `path | none`, `bf16 | fp32` or `list of text`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(parts[0], [*metadata, *_flat(parts[1:])])
    if origin in (Union, UnionType):
        words = [type_text(part, metadata if part is not NoneType else ()) for part in parts]
        return " | ".join(dict.fromkeys(words))
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin is list:
        return f"list of {type_text(parts[0])}"
    if origin is tuple:
        return f"[{', '.join(map(type_text, parts))}]"
    if annotation is str and any(isinstance(entry, AfterValidator) and entry.func is expand_path for entry in metadata):
        return "path"
    bounds = [
        f" {sign} {getattr(entry, side)}"
        for entry in metadata
        for kind, (sign, side) in BOUNDS.items()
        if type(entry) is kind
    ]
    return WORDS.get(origin or annotation, str(annotation)) + " and".join(bounds)


def _flat(metadata: Sequence[Any]) -> list[Any]:
    """Return the constraints, with every `Field(...)` replaced by the constraints inside it."""
    return [part for entry in metadata for part in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
