"""Finds a megalign checkpoint by its own directory, its run's directory, or the pointer to the run's newest one."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megalign.schema import UserError

STEP = re.compile(r"step_\d+")
POINTER = "latest"  # in a run's `checkpoints`: a JSON file that names the newest one
MARK = "metadata.json"  # a file that names the format, in every checkpoint with Megatron's files
FACTS = "checkpoint.json"  # which engine and job wrote it, and how many steps the job was to take
HF_FILES = "hf"  # folder in a checkpoint: the Hugging Face files that are not weights


def replaced_path(final: Path) -> Path:
    """Return the temporary path of a checkpoint while a new one of the same step replaces it."""
    return final.with_name(f".{final.name}.replaced")


def is_checkpoint(path: Path) -> bool:
    """Tell whether a directory is a checkpoint of any engine or of a conversion."""
    return (path / MARK).is_file() or (path / FACTS).is_file()


def find_checkpoint_dir(path: Path) -> Path:
    """Return the checkpoint that `path` names: itself, or the newest of a run, its `checkpoints` or its `latest`.

    A path without checkpoints nearby is returned as it is; the reader will refuse it.
    """
    if is_checkpoint(path):
        return path
    holder = next((folder for folder in (path / "checkpoints", path, path.parent) if _steps(folder)), None)
    if holder is None:
        return path
    steps = ", ".join(_steps(holder))
    if path not in (holder, holder.parent, holder / POINTER):
        raise UserError(f"{path} is not a checkpoint; must be one that is there: {holder} holds {steps}")
    newest = read_pointer(holder)
    if newest is None:
        pointer = holder / POINTER
        raise UserError(f"{pointer} is missing, which names the newest checkpoint; must be one of {steps}")
    return newest


def read_pointer(holder: Path, *, advice: str = "") -> Path | None:
    """Return the checkpoint that `latest` in a run's `checkpoints` directory names; None where there is no such file.

    Raises UserError where that checkpoint is missing; `advice` is appended to the error.
    """
    pointer = holder / POINTER
    if not pointer.is_file():
        return None
    try:
        name = json.loads(pointer.read_text(encoding="utf-8"))["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        name = None
    if isinstance(name, str) and STEP.fullmatch(name):
        # A save may have been killed after it had renamed this checkpoint.
        for folder in (holder / name, replaced_path(holder / name)):
            if folder.is_dir():
                return folder
    there = ", ".join(sorted(path.name for path in holder.iterdir() if STEP.fullmatch(path.name))) or "none"
    raise UserError(f"{pointer}: checkpoint is {name!r}; must be one that is there: {there}{advice}")


def other_steps(checkpoint: Path) -> list[str]:
    """List the names of all checkpoints of the run that `checkpoint` belongs to; empty for one outside a run."""
    return _steps(checkpoint.parent) if STEP.fullmatch(checkpoint.name) else []


def _steps(folder: Path) -> list[str]:
    """List the names of the checkpoints in a run's `checkpoints` directory, in order."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if STEP.fullmatch(path.name) and is_checkpoint(path))
