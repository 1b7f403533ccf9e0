"""Finding a Megatron checkpoint of ours: by its own directory, its run, or the pointer to a run's newest."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megalign.schema import UserError

STEP = re.compile(r"step_\d+")
POINTER = "latest"  # in a run's `checkpoints`: a JSON file that names the newest one
MARK = "metadata.json"  # what every checkpoint has


def replaced_path(final: Path) -> Path:
    """Return the name that a checkpoint has while another of the same step takes its place."""
    return final.with_name(f".{final.name}.replaced")


def find_checkpoint_dir(path: Path) -> Path:
    """The checkpoint that `path` names: itself, or a run's newest where it is a run, its `checkpoints` or `latest`.

    What is no checkpoint is given back as it is where nothing near it is one; the reader refuses it.
    """
    if (path / MARK).is_file():
        return path
    holder = next((one for one in (path / "checkpoints", path, path.parent) if _steps(one)), None)
    if holder is None:
        return path
    steps = ", ".join(_steps(holder))
    if path not in (holder, holder.parent, holder / POINTER):
        raise UserError(f"{path} is not a checkpoint; must be one that is there: {holder} holds {steps}")
    pointer = holder / POINTER
    try:
        name = json.loads(pointer.read_text(encoding="utf-8"))["checkpoint"]
    except FileNotFoundError:
        raise UserError(f"{pointer} is missing, which names the newest checkpoint; must be one of {steps}") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f'{pointer} cannot be read; must be {{"checkpoint": one of {steps}}}') from None
    known = name in _steps(holder)
    if not known and isinstance(name, str) and (replaced_path(holder / name) / MARK).is_file():
        return replaced_path(holder / name)  # a save was killed after it had renamed this one aside
    if not known:
        raise UserError(f"{pointer}: checkpoint is {name!r}; must be one that is there: {steps}")
    return holder / name


def other_steps(checkpoint: Path) -> list[str]:
    """The names of a run's checkpoints, of which `checkpoint` is one; none where it is alone."""
    return _steps(checkpoint.parent) if STEP.fullmatch(checkpoint.name) else []


def _steps(folder: Path) -> list[str]:
    """The names of the checkpoints in a run's `checkpoints` directory, in order."""
    if not folder.is_dir():
        return []
    return sorted(one.name for one in folder.iterdir() if STEP.fullmatch(one.name) and (one / MARK).is_file())
