"""Declares what a checkpoint says of itself in its FACTS, and reads it; also from checkpoints of earlier versions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalign.convert.megatron.checkpoint_dir import FACTS
from megalign.model_config import Lora
from megalign.schema import UserError, reason_of

FORMAT = 1  # of FACTS
OLD_FACTS = "job.json"  # the job alone, in checkpoints of earlier versions


class Damaged(UserError):
    """Says that a checkpoint is not as it was written, so that an earlier one may serve."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Holds facts about a checkpoint; `job` is None in one of an earlier version or of `hf_to_megatron.py`."""

    engine: str
    dtype: str  # of the weights, as torch names it
    optimizer: bool  # whether an optimizer and a position are inside; else it holds weights alone
    adapters: Lora | None = None
    base: str | None = None  # `model.path` of the job
    job: dict[str, Any] | None = None  # its fingerprint
    num_steps: int | None = None
    started_from: str | None = None  # the directory that `checkpoint.resume` named
    step: int | None = None  # that it is after; None in checkpoints of earlier versions


def read_facts(folder: Path) -> Facts:
    """Read the facts about a checkpoint; UserError where megalign did not write it."""
    plain = read_plain(folder) or {}
    if "engine" not in plain:  # of an earlier version, or converted: the rest is read from Megatron's own files
        # Imported here: it takes a second, and checkpoints of this version do not need it.
        from megalign.convert.megatron.about import read_about

        about = read_about(folder)
        job, num_steps, started = (plain.get(key) for key in ("job", "num_steps", "started_from"))
        return Facts("megatron", about.dtype, about.optimizer, about.lora, about.base, job, num_steps, started)
    saved = {key: value for key, value in plain.items() if key in Facts.__dataclass_fields__}
    if saved["adapters"] is not None:
        adapters = saved["adapters"]
        saved["adapters"] = Lora(adapters["rank"], adapters["alpha"], tuple(adapters["targets"]))
    return Facts(**saved)


def read_plain(folder: Path) -> dict[str, Any] | None:
    """Read a checkpoint's FACTS, or OLD_FACTS, as plain values; None for one that has neither."""
    path = next((folder / name for name in (FACTS, OLD_FACTS) if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        plain: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(plain, dict) or "format" not in plain:
            raise TypeError("it has no format")
        version = plain["format"]
        if version == FORMAT and not (isinstance(job := plain.get("job"), dict) and isinstance(job.get("data"), dict)):
            raise TypeError("its job has no section data")
        if version == FORMAT and path.name == FACTS:
            _check_kinds(plain)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{path} cannot be read ({reason_of(error)}); must be as megalign wrote it") from None
    if version != FORMAT:
        raise UserError(f"{path}: format is {version!r}; must be {FORMAT}, which is what this version reads")
    return plain


def _check_kinds(plain: dict[str, Any]) -> None:
    """Raise TypeError for facts that are not of their kinds, KeyError for missing ones."""
    kinds: dict[str, Any] = {
        "engine": str,
        "dtype": str,
        "optimizer": bool,
        "adapters": dict | None,
        "base": str | None,
        "num_steps": int | None,
        "started_from": str | None,
    }
    for key, kind in kinds.items():
        if not isinstance(plain[key], kind):
            raise TypeError(f"{key} is {plain[key]!r}")
    if not isinstance(plain.get("step"), int | None):
        raise TypeError(f"step is {plain['step']!r}")
    adapters = plain["adapters"]
    kinds = {} if adapters is None else {"rank": int, "alpha": int | float, "targets": list}
    for key, kind in kinds.items():
        if not isinstance(adapters[key], kind):
            raise TypeError(f"adapters.{key} is {adapters[key]!r}")


def started_from(checkpoint: Path) -> str | None:
    """Return the directory that the run of a checkpoint was started from by `checkpoint.resume`, if any."""
    plain = read_plain(checkpoint)
    return None if plain is None else plain.get("started_from")
