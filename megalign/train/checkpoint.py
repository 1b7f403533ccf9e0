"""Writes and finds the checkpoints of a run directory; only complete ones count.

A checkpoint is written under a temporary name, synced, renamed, and then `latest` points to it. Every function here
is called on every rank; rank 0 alone touches the directory, apart from what the engine writes.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalign.convert.hf.model import HFModel, read_model
from megalign.convert.megatron.checkpoint_dir import (
    FACTS,
    HF_FILES,
    MARK,
    POINTER,
    is_checkpoint,
    read_pointer,
    replaced_path,
)
from megalign.engines.protocol import Engine
from megalign.files import move, sync_tree, write_whole
from megalign.model_config import Lora
from megalign.schema import UserError, reason_of

FORMAT = 1  # of FACTS
NAME = re.compile(r"step_(\d{8})")
FILES = "files.json"  # the name and size of every other file, so that an incomplete copy is noticed
OLD_FACTS = "job.json"  # the job alone, in checkpoints of earlier versions


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


def save_checkpoint(
    engine: Engine,
    run_dir: Path,
    step: int,
    extra: dict[str, Any],
    *,
    facts: Facts,
    keep: int,
    keep_every: int,
    spare: str | None = None,
) -> Path:
    """Write `checkpoints/step_<step>` and drop older ones: the newest `keep` stay, and every `keep_every`-th step's.

    spare: the directory that `checkpoint.resume` names, which a restart must find again.
    """
    folder = run_dir / "checkpoints"
    final, partial = folder / f"step_{step:08d}", folder / f".step_{step:08d}.partial"
    main = dist.get_rank() == 0
    if main:
        _clear_leftovers(folder)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save(partial, extra)
    dist.barrier()
    if main:
        write_whole(partial / FACTS, json.dumps({"format": FORMAT, **asdict(facts)}, indent=1))
        write_whole(partial / FILES, json.dumps(_sizes(partial)))
        sync_tree(partial)
        replaced = None
        if final.exists():  # of a run that took this step before; renamed, it still counts until the new one does
            replaced = move(final, replaced_path(final))
        move(partial, final)
        write_latest(folder, final.name)
        if replaced is not None:
            shutil.rmtree(replaced)
        _drop_old(folder, step, keep=keep, keep_every=keep_every, spare=spare)
    dist.barrier()
    return final


def _clear_leftovers(folder: Path) -> None:
    """Remove what killed saves left; a checkpoint that was renamed to be replaced gets its name back."""
    for replaced in folder.glob(".step_*.replaced"):
        final = folder / replaced.name.removeprefix(".").removesuffix(".replaced")
        if final.exists():
            shutil.rmtree(replaced)
        else:
            move(replaced, final)
    for leftover in [*folder.glob(".step_*.partial"), *folder.glob(".step_*.dropped")]:
        shutil.rmtree(leftover)


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Holds the checkpoint that a run resumes from; `own`: it is one of this run directory's.

    named: the directory that `checkpoint.resume` gives. since: the run started from `named` and has saved since.
    """

    folder: Path
    own: bool
    named: Path | None = None
    since: bool = False


def find_checkpoint(run_dir: Path, resume: str) -> ResumePoint | None:
    """Find the checkpoint that `checkpoint.resume` means: the newest here, none, or that of the named directory.

    Once a run that started from a named directory has saved, its own newest checkpoint counts, so that a restart with
    the same command loses nothing.
    """
    if resume == "never":
        return None
    own = latest(run_dir / "checkpoints")
    if resume == "auto":
        return None if own is None else ResumePoint(own, own=True)
    named = Path(resume)
    if own is not None and started_from(own) == str(named.resolve()):
        return ResumePoint(own, own=True, named=named, since=True)
    if named.name == POINTER and named.is_file():
        candidates: tuple[Path | None, ...] = (latest(named.parent),)
    else:
        candidates = (
            named if is_checkpoint(named) else None,
            latest(named),
            latest(named / "checkpoints"),
        )
    checkpoint = next((folder for folder in candidates if folder is not None), None)
    if checkpoint is None:
        raise UserError(
            f"checkpoint.resume is {resume!r}: it holds no checkpoint; must be auto, never, a checkpoint "
            "or a run directory with checkpoints"
        )
    inside = checkpoint.resolve().parent == (run_dir / "checkpoints").resolve()
    return ResumePoint(checkpoint, own=inside, named=named)


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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}); must be as megalign wrote it") from None
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
    adapters = plain["adapters"]
    kinds = {} if adapters is None else {"rank": int, "alpha": int | float, "targets": list}
    for key, kind in kinds.items():
        if not isinstance(adapters[key], kind):
            raise TypeError(f"adapters.{key} is {adapters[key]!r}")


def started_from(checkpoint: Path) -> str | None:
    """Return the directory that the run of a checkpoint was started from by `checkpoint.resume`, if any."""
    plain = read_plain(checkpoint)
    return None if plain is None else plain.get("started_from")


def newer_than(checkpoint: Path) -> list[Path]:
    """Return the checkpoints of later steps in the same directory."""
    name = checkpoint.name.removeprefix(".").removesuffix(".replaced")
    return sorted(path for path in checkpoint.parent.iterdir() if NAME.fullmatch(path.name) and path.name > name)


def latest(folder: Path) -> Path | None:
    """Return the checkpoint that `latest` names, or None where nothing was ever finished."""
    # An error if it is unreadable: beginning anew silently would lose the run.
    return read_pointer(folder, advice="; to begin anew, checkpoint.resume=never")


def check_whole(folder: Path, model: HFModel) -> None:
    """Refuse a checkpoint whose files are missing or of another size, or whose model is not that of `model.path`."""
    for name in (FACTS if (folder / FACTS).is_file() else MARK, f"{HF_FILES}/config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing; must be a checkpoint that megalign wrote")
    held = read_model(folder / HF_FILES)
    theirs, ours = (held.config, model.config) if held.config and model.config else (held.facts, model.facts)
    for field in fields(ours):
        was, now = getattr(theirs, field.name), getattr(ours, field.name)
        if was != now:
            raise UserError(
                f"{folder}: its model has {field.name} {was}; must be that of model.path, {now}; to begin anew, "
                "another run.dir or checkpoint.resume=never"
            )
    listing = folder / FILES
    if not listing.is_file():  # a converted one
        return
    present = _sizes(folder)
    try:
        written = dict(json.loads(listing.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{listing} cannot be read ({reason_of(error)}); must be as megalign wrote it") from None
    for name, size in written.items():
        if present.get(name) != size:
            now = f"{present[name]} bytes long" if name in present else "missing"
            raise UserError(f"{folder}: {name} is {now}; must have the {size} bytes that were written")


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file below `folder`, FILES excepted."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / FILES)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def write_latest(folder: Path, name: str) -> None:
    """Point `latest` at a checkpoint, atomically."""
    write_whole(folder / POINTER, json.dumps({"checkpoint": name}))


def _drop_old(folder: Path, step: int, *, keep: int, keep_every: int, spare: str | None) -> None:
    """Remove this run's older checkpoints; later steps are an earlier run's and stay until this one gets there."""
    steps = sorted(int(match[1]) for path in folder.iterdir() if (match := NAME.fullmatch(path.name)))
    for old in [saved for saved in steps if saved <= step][:-keep]:
        path = folder / f"step_{old:08d}"
        if (keep_every and old % keep_every == 0) or (spare is not None and str(path.resolve()) == spare):
            continue
        shutil.rmtree(move(path, path.with_name(f".{path.name}.dropped")))  # renamed first: no checkpoint lacks files
