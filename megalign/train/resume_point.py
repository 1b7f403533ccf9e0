"""Finds the checkpoint that a run resumes from; only complete ones count.

Only rank 0 looks: the directory changes while other ranks would still be reading it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megalign.convert.megatron.checkpoint_dir import POINTER, is_checkpoint, read_pointer
from megalign.schema import UserError
from megalign.train.checkpoint_facts import started_from

NAME = re.compile(r"step_(\d{8})")


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


def newer_than(checkpoint: Path) -> list[Path]:
    """Return the checkpoints of later steps in the same directory."""
    name = checkpoint.name.removeprefix(".").removesuffix(".replaced")
    return sorted(path for path in checkpoint.parent.iterdir() if NAME.fullmatch(path.name) and path.name > name)


def latest(folder: Path) -> Path | None:
    """Return the checkpoint that `latest` names, or None where nothing was ever finished."""
    # An error if it is unreadable: beginning anew silently would lose the run.
    return read_pointer(folder, advice="; to begin anew, checkpoint.resume=never")
