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

from megalign.engines.engine import Engine
from megalign.schema import UserError

NAME = re.compile(r"step_(\d{8})")


def save_checkpoint(
    engine: Engine, run_dir: Path, step: int, extra: dict[str, Any], *, keep: int, keep_every: int
) -> Path:
    """Write `checkpoints/step_<step>` and drop older ones: the newest `keep` stay, and every `keep_every`-th step's."""
    folder = run_dir / "checkpoints"
    final, partial = folder / f"step_{step:08d}", folder / f".step_{step:08d}.partial"
    main = dist.get_rank() == 0
    if main:
        for leftover in (partial, final):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save(partial, extra)
    dist.barrier()
    if main:
        _sync_tree(partial)
        partial.rename(final)
        _write_latest(folder, final.name)
        _drop_old(folder, keep=keep, keep_every=keep_every)
    dist.barrier()
    return final


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that `checkpoint.resume` means: the newest whole one here, none, or the named directory."""
    if resume == "never":
        return None
    if resume != "auto":
        named = Path(resume)
        if (named / "metadata.json").is_file():
            return named
        found = latest(named)
        if found is None:
            raise UserError(
                f"checkpoint.resume is {resume!r}: it holds no checkpoint; allowed: auto, never, a checkpoint"
            )
        return found
    return latest(run_dir / "checkpoints")


def latest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, or None where nothing was ever finished."""
    pointer = folder / "latest"
    if not pointer.is_file():
        return None
    named = folder / json.loads(pointer.read_text(encoding="utf-8"))["checkpoint"]
    return named if named.is_dir() else None


def _write_latest(folder: Path, name: str) -> None:
    partial = folder / ".latest.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump({"checkpoint": name}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / "latest")
    _sync(folder)


def _drop_old(folder: Path, *, keep: int, keep_every: int) -> None:
    found = sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))
    for path in found[:-keep]:
        step = int(path.name.removeprefix("step_"))
        if not keep_every or step % keep_every:
            shutil.rmtree(path)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
