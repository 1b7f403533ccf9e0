"""Finds the checkpoint that a run resumes from: the newest that is whole; damaged ones are passed over and named.

Only rank 0 looks: the directory changes while other ranks would still be reading it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from megalign.convert.megatron.checkpoint_dir import POINTER, holder_of, is_checkpoint, replaced_path
from megalign.files import reading
from megalign.schema import UserError
from megalign.train.checkpoint_facts import Damaged, started_from
from megalign.train.checkpoint_files import FILES, NAME, check_share, check_undamaged, extra_files, shown_name

NONE: Mapping[Path, str] = MappingProxyType({})
ANEW = "to begin anew, another run.dir or checkpoint.resume=never"


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Holds the checkpoint that a run resumes from; `own`: it is one of this run directory's.

    named: the checkpoint or directory that `checkpoint.resume` gives. since: the run started from `named` and has saved
    since. notes: for the log, which checkpoints were passed over and why.
    """

    folder: Path
    own: bool
    named: Path | None = None
    since: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Newest:
    """Holds the newest whole checkpoint of a directory, if any, and what was wrong with each newer one."""

    folder: Path | None
    problems: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """Return log lines: the newer ones that are passed over, files that nobody wrote, a pointer to another."""
        lines = [f"passed over: {problem}" for problem in self.problems]
        if self.folder is None:
            return lines
        if extra := extra_files(self.folder):
            lines.append(f"{self.folder}: {', '.join(extra[:3])} is not of the checkpoint and is not read")
        pointer = self.folder.parent / POINTER
        named = pointed_to(self.folder.parent)
        if named != shown_name(self.folder):
            said = f"names {named}" if named else "does not name a checkpoint" if pointer.exists() else "is missing"
            lines.append(f"{pointer} {said}; the newest whole checkpoint is {shown_name(self.folder)}")
        return lines


def pointed_to(holder: Path) -> str | None:
    """Return the name in `latest`; None where there is none that can be read."""
    if not (holder / POINTER).is_file():
        return None
    try:
        name = json.loads((holder / POINTER).read_text(encoding="utf-8"))["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def checkpoints_in(holder: Path) -> list[Path]:
    """Return the checkpoints of a run's `checkpoints` directory, the newest first."""
    if not holder.is_dir():
        return []
    names = {shown_name(path) for path in holder.iterdir() if NAME.fullmatch(shown_name(path)) and path.is_dir()}
    # A save may have been killed after it had renamed a checkpoint of the same step; partial ones have other names.
    both = [(holder / name, replaced_path(holder / name)) for name in sorted(names, reverse=True)]
    return [path if path.is_dir() else before for path, before in both if path.is_dir() or before.is_dir()]


def find_newest(holder: Path, damaged: Mapping[Path, str] = NONE) -> Newest:
    """Find the newest whole checkpoint; damaged: what is known of some checkpoints' contents."""
    problems: list[str] = []
    for folder in checkpoints_in(holder):
        try:
            if folder in damaged:
                raise Damaged(damaged[folder])
            check_undamaged(folder)
        except Damaged as error:
            problems.append(str(error))
            continue
        return Newest(folder, tuple(problems))
    if not problems and (holder / POINTER).exists():  # somebody has moved them
        problems.append(f"{holder / POINTER}: checkpoint is {pointed_to(holder)!r}; must be one that is there: none")
    return Newest(None, tuple(problems))


def latest(holder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run's `checkpoints` directory, None without one that can be read."""
    with suppress(OSError):
        return find_newest(holder).folder
    return None


def whole_checkpoint(path: Path) -> Newest:
    """Return the checkpoint that `path` is, or the newest whole one of the run that it names, after reading its files.

    UserError where it, or every one of the run, is damaged. A path without checkpoints nearby is returned as it is.
    """
    with reading(path):
        holder = holder_of(path)
        if holder is None:
            if (path / FILES).exists():
                check_undamaged(path)
                check_share(path, rank=0, num_ranks=1)
            return Newest(path)
        damaged: dict[Path, str] = {}
        while (found := find_newest(holder, damaged)).folder is not None:
            try:
                check_share(found.folder, rank=0, num_ranks=1)
            except Damaged as error:
                damaged[found.folder] = str(error)
                continue
            return found
    raise UserError(_none_whole(found, ""))


def find_checkpoint(run_dir: Path, resume: str, damaged: Mapping[Path, str] = NONE) -> ResumePoint | None:
    """Find the checkpoint that `checkpoint.resume` means: the newest here, none, or that of the named directory.

    Once a run that started from a named directory has saved, its own newest checkpoint counts, so that a restart with
    the same command loses nothing. damaged: as in `find_newest`. Raises UserError where there are checkpoints and none
    of them is whole, or they cannot be read: beginning anew silently would lose the run.
    """
    if resume == "never":
        return None
    with reading(run_dir):
        return _find(run_dir, resume, damaged)


def _find(run_dir: Path, resume: str, damaged: Mapping[Path, str]) -> ResumePoint | None:
    own = find_newest(run_dir / "checkpoints", damaged)
    if resume == "auto":
        if own.folder is None and own.problems:
            raise UserError(_none_whole(own, f"; {ANEW}"))
        return None if own.folder is None else ResumePoint(own.folder, own=True, notes=tuple(own.notes()))
    named = Path(resume)
    if own.folder is not None and started_from(own.folder) == os.path.realpath(named):
        return ResumePoint(own.folder, own=True, named=named, since=True, notes=tuple(own.notes()))
    checkpoint, notes = _find_named(named, resume, damaged)
    inside = os.path.dirname(os.path.realpath(checkpoint)) == os.path.realpath(run_dir / "checkpoints")
    if own.folder is None and not inside:
        notes = [*own.notes(), *notes]
    return ResumePoint(checkpoint, own=inside, named=named, notes=tuple(notes))


def _find_named(named: Path, resume: str, damaged: Mapping[Path, str]) -> tuple[Path, list[str]]:
    """Return the checkpoint that a directory is or holds, with lines for the log."""
    if named.name == POINTER and named.is_file():
        holders = [named.parent]
    elif is_checkpoint(named):
        if named in damaged:
            raise UserError(damaged[named])
        return named, []  # whether it is whole is asked when the model is known
    else:
        holders = [named, named / "checkpoints"]
    found = [find_newest(holder, damaged) for holder in holders]
    for each in found:
        if each.folder is not None:
            return each.folder, each.notes()
    for each in found:
        if each.problems:
            raise UserError(_none_whole(each, f"; checkpoint.resume is {resume!r}"))
    raise UserError(
        f"checkpoint.resume is {resume!r}: it holds no checkpoint; must be auto, never, a checkpoint "
        "or a run directory with checkpoints"
    )


def _none_whole(newest: Newest, advice: str) -> str:
    """Return the line that refuses checkpoints of which none is whole."""
    count = len(newest.problems) - 1
    others = "; the one before it is damaged too" if count == 1 else f"; the {count} before it are damaged too"
    others = others if count else ""
    return f"{newest.problems[0]}{others}{advice}"


def newer_than(checkpoint: Path) -> list[Path]:
    """Return the checkpoints of later steps in the same directory."""
    name = shown_name(checkpoint)
    return sorted(path for path in checkpoint.parent.iterdir() if NAME.fullmatch(path.name) and path.name > name)
