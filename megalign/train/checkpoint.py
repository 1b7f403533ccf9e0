"""Which checkpoints a run directory holds, and how one comes to count: only once it is whole.

A checkpoint is written under a temporary name, synced, renamed, and then `latest` is moved to it. Every function here
is called on every rank; rank 0 alone touches the directory, apart from what the engine writes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalign.convert import ModelConfig, read_model_config
from megalign.convert.checkpoint_dir import MARK, POINTER, replaced_path
from megalign.convert.writer import sync
from megalign.engines.engine import Engine
from megalign.engines.megatron_state import HF_FILES
from megalign.schema import UserError, reason_of

FORMAT = 1  # of JOB
NAME = re.compile(r"step_(\d{8})")
FILES = "files.json"  # the name and size of every other file, so that a copy cut short is seen
JOB = "job.json"  # which job wrote it, and how long it meant to be


def save_checkpoint(
    engine: Engine,
    run_dir: Path,
    step: int,
    extra: dict[str, Any],
    *,
    about: Mapping[str, Any],
    keep: int,
    keep_every: int,
    spare: str | None = None,
) -> Path:
    """Write `checkpoints/step_<step>` and drop older ones: the newest `keep` stay, and every `keep_every`-th step's.

    about: what JOB says. spare: the directory that `checkpoint.resume` names, which a restart must find again.
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
        (partial / JOB).write_text(json.dumps({"format": FORMAT, **about}, indent=1), encoding="utf-8")
        (partial / FILES).write_text(json.dumps(_sizes(partial)), encoding="utf-8")
        _sync_tree(partial)
        replaced = None
        if final.exists():  # of a run that took this step before; under its other name it counts until the new one does
            replaced = final.rename(replaced_path(final))
        partial.rename(final)
        write_latest(folder, final.name)
        if replaced is not None:
            shutil.rmtree(replaced)
        _drop_old(folder, step, keep=keep, keep_every=keep_every, spare=spare)
    dist.barrier()
    return final


def _clear_leftovers(folder: Path) -> None:
    """Remove what killed saves left; a checkpoint that had been renamed aside for another gets its name back."""
    for replaced in folder.glob(".step_*.replaced"):
        final = folder / replaced.name.removeprefix(".").removesuffix(".replaced")
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)
    for leftover in [*folder.glob(".step_*.partial"), *folder.glob(".step_*.dropped")]:
        shutil.rmtree(leftover)


@dataclass(frozen=True, slots=True)
class Found:
    """The checkpoint that a run goes on from; `own`: it is one of this run directory's.

    named: the directory that `checkpoint.resume` gives. since: it is not this checkpoint but where the run started.
    """

    folder: Path
    own: bool
    named: Path | None = None
    since: bool = False


def find_checkpoint(run_dir: Path, resume: str) -> Found | None:
    """The checkpoint that `checkpoint.resume` means: the newest whole one here, none, or that of the named directory.

    Of a named directory: once this run has started from it and saved, the run's own newest checkpoint counts, so that
    a restart with the same command loses nothing.
    """
    if resume == "never":
        return None
    own = latest(run_dir / "checkpoints")
    if resume == "auto":
        return None if own is None else Found(own, own=True)
    named = Path(resume)
    if own is not None and started_from(own) == str(named.resolve()):
        return Found(own, own=True, named=named, since=True)
    if named.name == POINTER and named.is_file():
        candidates: tuple[Path | None, ...] = (latest(named.parent),)
    else:
        candidates = (named if (named / MARK).is_file() else None, latest(named), latest(named / "checkpoints"))
    found = next((folder for folder in candidates if folder is not None), None)
    if found is None:
        raise UserError(
            f"checkpoint.resume is {resume!r}: it holds no checkpoint; must be auto, never, a checkpoint "
            "or a run directory with checkpoints"
        )
    inside = found.resolve().parent == (run_dir / "checkpoints").resolve()
    return Found(found, own=inside, named=named)


def read_job(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint's JOB says; None for one that has none, written before there was one, or converted."""
    path = folder / JOB
    if not path.is_file():
        return None
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = about["format"]
        if found == FORMAT and not (isinstance(job := about.get("job"), dict) and isinstance(job.get("data"), dict)):
            raise TypeError("its job has no section data")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}); must be as megalign wrote it") from None
    if found != FORMAT:
        raise UserError(f"{path}: format is {found!r}; must be {FORMAT}, which is what this version reads")
    return about


def started_from(checkpoint: Path) -> str | None:
    """The directory that the run of a checkpoint was started from by `checkpoint.resume`, if any."""
    about = read_job(checkpoint)
    return None if about is None else about.get("started_from")


def newer_than(checkpoint: Path) -> list[Path]:
    """Checkpoints of later steps in the same directory."""
    name = checkpoint.name.removeprefix(".").removesuffix(".replaced")
    return sorted(path for path in checkpoint.parent.iterdir() if NAME.fullmatch(path.name) and path.name > name)


def latest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, or None where nothing was ever finished."""
    pointer = folder / POINTER
    if not pointer.is_file():
        return None
    try:
        name = json.loads(pointer.read_text(encoding="utf-8"))["checkpoint"]
    except (ValueError, KeyError, TypeError):
        name = None
    known = isinstance(name, str) and NAME.fullmatch(name) is not None
    if known and not (folder / name).is_dir() and replaced_path(folder / name).is_dir():
        return replaced_path(folder / name)  # a save was killed after it had renamed this one aside
    if not known or not (folder / name).is_dir():
        # Beginning anew without a word would throw the run away.
        held = ", ".join(sorted(path.name for path in folder.iterdir() if NAME.fullmatch(path.name))) or "none"
        raise UserError(
            f"{pointer}: checkpoint is {name!r}; must be one that is there: {held}; "
            "to begin anew, checkpoint.resume=never"
        )
    return folder / name


def check_whole(folder: Path, model: ModelConfig) -> None:
    """Refuse a checkpoint whose files are not what was written, or whose model is not that of `model.path`."""
    for name in (MARK, f"{HF_FILES}/config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing; must be a checkpoint that megalign wrote")
    held = read_model_config(folder / HF_FILES)
    for field in model.__dataclass_fields__:
        if getattr(held, field) != getattr(model, field):
            raise UserError(
                f"{folder}: its model has {field} {getattr(held, field)}; must be that of model.path, "
                f"{getattr(model, field)}; to begin anew, another run.dir or checkpoint.resume=never"
            )
    listing = folder / FILES
    if not listing.is_file():  # a converted one
        return
    found = _sizes(folder)
    try:
        written = dict(json.loads(listing.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{listing} cannot be read ({reason_of(error)}); must be as megalign wrote it") from None
    for name, size in written.items():
        if found.get(name) != size:
            now = f"{found[name]} bytes long" if name in found else "missing"
            raise UserError(f"{folder}: {name} is {now}; must have the {size} bytes that were written")


def _sizes(folder: Path) -> dict[str, int]:
    """Every file below and how many bytes it has, the listing itself aside."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / FILES)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def write_latest(folder: Path, name: str) -> None:
    """Move `latest` to a checkpoint, whole or not at all."""
    partial = folder / ".latest.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump({"checkpoint": name}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / POINTER)
    sync(folder)


def _drop_old(folder: Path, step: int, *, keep: int, keep_every: int, spare: str | None) -> None:
    """Later steps are not this run's: it began anew, or from an earlier one. They stay until it gets there."""
    steps = sorted(int(match[1]) for path in folder.iterdir() if (match := NAME.fullmatch(path.name)))
    for old in [one for one in steps if one <= step][:-keep]:
        path = folder / f"step_{old:08d}"
        if (keep_every and old % keep_every == 0) or (spare is not None and str(path.resolve()) == spare):
            continue
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.dropped")))  # never a name with half of its files


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)
