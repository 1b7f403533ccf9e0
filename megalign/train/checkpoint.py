"""Which checkpoints a run directory holds, and how one comes to count: only once it is whole.

A checkpoint is written under a temporary name, synced, renamed, and then `latest` is moved to it. Every function here
is called on every rank; rank 0 alone touches the directory, apart from what the engine writes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalign.convert import ModelConfig, read_model_config
from megalign.convert.writer import sync
from megalign.engines.engine import Engine
from megalign.engines.megatron_state import HF_FILES
from megalign.schema import UserError

NAME = re.compile(r"step_(\d{8})")
MARK = "metadata.json"  # with HF_FILES, what every checkpoint of ours has
FILES = "files.json"  # the name and size of every other file, so that a copy cut short is seen


def save_checkpoint(
    engine: Engine, run_dir: Path, step: int, extra: dict[str, Any], *, keep: int, keep_every: int
) -> Path:
    """Write `checkpoints/step_<step>` and drop older ones: the newest `keep` stay, and every `keep_every`-th step's."""
    folder = run_dir / "checkpoints"
    final, partial = folder / f"step_{step:08d}", folder / f".step_{step:08d}.partial"
    main = dist.get_rank() == 0
    if main:
        for leftover in folder.glob(".step_*.partial"):  # of saves that a killed run began
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save(partial, extra)
    dist.barrier()
    if main:
        (partial / FILES).write_text(json.dumps(_sizes(partial)), encoding="utf-8")
        _sync_tree(partial)
        if final.exists():  # of a run that took this step before; it counts until now
            shutil.rmtree(final)
        partial.rename(final)
        _write_latest(folder, final.name)
        _drop_old(folder, step, keep=keep, keep_every=keep_every)
    dist.barrier()
    return final


def find_checkpoint(run_dir: Path, resume: str, model: ModelConfig) -> Path | None:
    """The checkpoint that `checkpoint.resume` means: the newest whole one here, none, or the named directory.

    Refuses one that is damaged or of another model.
    """
    if resume == "never":
        return None
    if resume == "auto":
        found = latest(run_dir / "checkpoints")
    else:
        named = Path(resume)
        candidates = (named if (named / MARK).is_file() else None, latest(named), latest(named / "checkpoints"))
        found = next((folder for folder in candidates if folder is not None), None)
        if found is None:
            raise UserError(
                f"checkpoint.resume is {resume!r}: it holds no checkpoint; must be auto, never, a checkpoint "
                "or a run directory with checkpoints"
            )
    if found is not None:
        _check(found, model)
    return found


def latest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, or None where nothing was ever finished."""
    pointer = folder / "latest"
    if not pointer.is_file():
        return None
    try:
        name = json.loads(pointer.read_text(encoding="utf-8"))["checkpoint"]
    except (ValueError, KeyError, TypeError):
        name = None
    if not isinstance(name, str) or not NAME.fullmatch(name) or not (folder / name).is_dir():
        # Beginning anew without a word would throw the run away.
        held = ", ".join(sorted(path.name for path in folder.iterdir() if NAME.fullmatch(path.name))) or "none"
        raise UserError(f"{pointer}: checkpoint is {name!r}; must be one that is there: {held}; or remove the file")
    return folder / name


def _check(folder: Path, model: ModelConfig) -> None:
    """Refuse a checkpoint whose files are not what was written, or whose model is not that of `model.path`."""
    for name in (MARK, f"{HF_FILES}/config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing; must be a checkpoint that megalign wrote")
    held = read_model_config(folder / HF_FILES)
    for field in model.__dataclass_fields__:
        if getattr(held, field) != getattr(model, field):
            raise UserError(
                f"{folder}: its model has {field} {getattr(held, field)}; must be that of model.path, "
                f"{getattr(model, field)}"
            )
    listing = folder / FILES
    if not listing.is_file():  # a converted one
        return
    found = _sizes(folder)
    for name, size in json.loads(listing.read_text(encoding="utf-8")).items():
        if found.get(name) != size:
            now = f"{found[name]} bytes long" if name in found else "missing"
            raise UserError(f"{folder}: {name} is {now}; must have the {size} bytes that were written")


def _sizes(folder: Path) -> dict[str, int]:
    """Every file below and how many bytes it has, the listing itself aside."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / FILES)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _write_latest(folder: Path, name: str) -> None:
    partial = folder / ".latest.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump({"checkpoint": name}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / "latest")
    sync(folder)


def _drop_old(folder: Path, step: int, *, keep: int, keep_every: int) -> None:
    """Later steps are not this run's: it began anew, or from an earlier one. They stay until it gets there."""
    steps = sorted(int(match[1]) for path in folder.iterdir() if (match := NAME.fullmatch(path.name)))
    for old in [one for one in steps if one <= step][:-keep]:
        if not keep_every or old % keep_every:
            shutil.rmtree(folder / f"step_{old:08d}")


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)
