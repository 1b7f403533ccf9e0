"""Describes a job by plain values that identify it; a checkpoint keeps them and a resume compares them.

Contents count, not paths: a moved model or data file is the same. A resumed run may change run.dir, its length, the
layout, settings of speed, and what is written where and when.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megalign.config.job import JobConfig
from megalign.convert.hf.digest import folder_digest, tokenizer_digest, weights_digest
from megalign.data.dataset import GroupDataset
from megalign.rollout.prompts import Prompt
from megalign.schema import UserError, allowed_keys, shorten
from megalign.train.inputs import Inputs

# Keys of `data` and `rollout` that change no batch, or only in ways that the digest of the records shows.
FREE_DATA = {"tokens_per_micro_batch", "packing", "format", "on_bad_record", "extra_fields", "cache_dir", "sources"}
FREE_ROLLOUT = {"rounds"}
SOURCES = "data.sources"  # compared together with data.path, by the records read from them


@dataclass(frozen=True, slots=True)
class Difference:
    """Names a key in which two jobs differ, with both values as text."""

    key: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.key} was {self.was}, is {self.now}"


def settings(cfg: JobConfig) -> dict[str, Any]:
    """Return the sections and keys that identify a job; None where `describe` fills in a digest of contents."""
    plain = cfg.model_dump(mode="json", by_alias=True)
    data = {key: value for key, value in plain["data"].items() if key not in FREE_DATA}
    result: dict[str, Any] = {
        "run": {key: plain["run"][key] for key in ("seed", "dtype")},
        "model": plain["model"] | {"path": None},
        "data": data | {"path": None},
        "loss": plain["loss"],
        "reference": {"source": plain["reference"]["source"]},
        "teachers": None,
        "optimizer": plain["optimizer"],
        "rollout": None,
        "checkpoint": {"resume": None},
    }
    if plain["rollout"] is not None:
        kept = {key: value for key, value in plain["rollout"].items() if key not in FREE_ROLLOUT}
        result["rollout"] = kept | {"path": None}
    return result


def describe(cfg: JobConfig, inputs: Inputs, weights: Path | None) -> dict[str, Any]:
    """Return the job's fingerprint; weights: a converted checkpoint whose weights replace those of model.path."""
    result = settings(cfg)
    result["model"]["path"] = _model(cfg.model.path, inputs.policy.folder)
    if inputs.reference is not None:
        result["reference"]["source"] = _model(str(cfg.reference.source), inputs.reference.folder)
    if cfg.teachers:
        teachers = {
            teacher.name: _model(teacher.path, model.folder)
            for teacher, model in zip(cfg.teachers, inputs.teachers, strict=True)
        }
        named = ", ".join(f"{name} {about['shown']}" for name, about in teachers.items())
        digest = _text_digest([name, model["digest"]] for name, model in teachers.items())
        result["teachers"] = {"shown": named, "digest": digest}
    if inputs.records is not None:
        dataset = inputs.records.dataset
        paths = [cfg.data.path] if cfg.data.path is not None else [source.path for source in cfg.data.sources or ()]
        digest = records_digest(dataset)
        shown = f"{', '.join(map(str, paths))} ({len(dataset)} records, {digest[:8]})"
        result["data"]["path"] = {"shown": shown, "digest": digest}
    if cfg.rollout is not None:
        digest = prompts_digest(inputs.prompts)
        shown = f"{cfg.rollout.path} ({len(inputs.prompts)} prompts, {digest[:8]})"
        result["rollout"]["path"] = {"shown": shown, "digest": digest}
    if weights is not None:
        digest = folder_digest(weights)
        result["checkpoint"]["resume"] = {"shown": f"{weights} (weights {digest[:8]})", "digest": digest}
    plain: dict[str, Any] = json.loads(json.dumps(result))  # as a checkpoint gives it back
    return plain


def _model(path: str, hf_dir: Path) -> dict[str, str]:
    weights, tokenizer = weights_digest(hf_dir), tokenizer_digest(hf_dir)
    shown = f"{path} (weights {weights[:8]}, tokenizer {tokenizer[:8]})"
    return {"shown": shown, "digest": f"{weights} {tokenizer}"}


def records_digest(dataset: GroupDataset) -> str:
    """Digest the tokenised records in order: ids, rewards, log-probs, scores; everything except the raw text."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr([(span.num_records, span.weight) for span in dataset.spans]).encode())
    for group in dataset.groups:
        for field in fields(group):
            if field.name not in ("raw", "responses"):
                _add(digest, getattr(group, field.name))
        for response in group.responses:
            for field in fields(response):
                _add(digest, getattr(response, field.name))
    return digest.hexdigest()


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """Digest prompts in order: ids, text and the record that the reward reads."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        _add(digest, prompt.ids)
        digest.update(json.dumps([prompt.text, dict(prompt.record)], sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Add a value; long tuples of numbers as bytes, which is a hundred times as fast as their text."""
    kind = type(value[0]) if isinstance(value, tuple) and value else None
    if kind in (int, float):
        try:
            content = array("q" if kind is int else "d", value)
            digest.update(f"{content.typecode}{len(content)} ".encode() + content.tobytes())
            return
        except (TypeError, OverflowError):  # mixed kinds, or too large
            pass
    if isinstance(value, Mapping):
        value = sorted(value.items())
    digest.update(f"{value!r};".encode())


def _text_digest(values: Iterable[Any]) -> str:
    return hashlib.blake2b(json.dumps(list(values)).encode(), digest_size=16).hexdigest()


def job_digest(job: Mapping[str, Any]) -> str:
    """Digest a fingerprint; paths do not count."""
    return _text_digest([_without_paths(job)])


def _without_paths(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "digest" in value:
        return value["digest"]
    return {key: _without_paths(inner) for key, inner in sorted(value.items())}


def differences(was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    """Return the keys whose values differ; keys of only one side are new or gone in this version and do not count."""
    result = []
    for key in (key for key in now if key in was):
        before, after, name = was[key], now[key], f"{prefix}{key}"
        if _is_section(before) and _is_section(after):
            result += differences(before, after, f"{name}.")
        elif _without_paths(before) != _without_paths(after):
            result.append(Difference(name, _shown(before), _shown(after)))
    return result


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping) and "digest" not in value


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return str(value["shown"]) if "digest" in value else "given"
    return shorten(value)


def check_allow(cfg: JobConfig) -> None:
    """Refuse a `checkpoint.allow` that names no key or section of a job's fingerprint."""
    known = {*_names(settings(cfg)), SOURCES}
    for index, key in enumerate(cfg.checkpoint.allow):
        if key not in known:
            raise UserError(
                f"checkpoint.allow.{index} is {key!r}: must be a key that identifies a job, or a section of such keys"
                f"{allowed_keys(key, known)}"
            )


def _names(tree: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{key}.")


def is_allowed(difference: Difference, allow: Iterable[str]) -> bool:
    """Tell whether `checkpoint.allow` names the key or a section that it is in."""
    key = difference.key
    if key == "rollout":  # rounds or none: a position in the one means nothing in the other
        return False
    named = {"data.path" if name == SOURCES else name for name in allow}
    return any(key == name or key.startswith(f"{name}.") for name in named)
