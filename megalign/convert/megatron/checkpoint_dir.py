"""Names the parts of a megalign checkpoint, and finds the folder that holds those of a run."""

from __future__ import annotations

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


def holder_of(path: Path) -> Path | None:
    """Return the folder of a run's checkpoints where `path` is the run, that folder or its `latest`; else None.

    UserError for a path that is no checkpoint where others are nearby.
    """
    if is_checkpoint(path):
        return None
    holder = next((folder for folder in (path / "checkpoints", path, path.parent) if _steps(folder)), None)
    if holder is None or path in (holder, holder.parent, holder / POINTER):
        return holder
    raise UserError(
        f"{path} is not a checkpoint; must be one that is there: {holder} holds {', '.join(_steps(holder))}"
    )


def other_steps(checkpoint: Path) -> list[str]:
    """List the names of all checkpoints of the run that `checkpoint` belongs to; empty for one outside a run."""
    return _steps(checkpoint.parent) if STEP.fullmatch(checkpoint.name) else []


def _steps(folder: Path) -> list[str]:
    """List the names of the checkpoints in a run's `checkpoints` directory, in order."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if STEP.fullmatch(path.name) and is_checkpoint(path))
