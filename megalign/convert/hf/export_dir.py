"""Checks whether an export may be written to a directory, and which run made the export that is there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalign.convert.hf.companions import companions
from megalign.convert.hf.weight_files import INDEX
from megalign.schema import UserError

ADAPTER, ADAPTER_FILES = "adapter", ("adapter_model.safetensors", "adapter_config.json")
MARK = ".megalign_export"  # only a directory with this file is ever replaced; it names the run that made it


@dataclass(frozen=True, slots=True)
class Owner:
    """Identifies the run that makes an export; a run's exports replace only its own earlier ones.

    run: its directory. job: digest of its configuration and data. resumed: it resumes a checkpoint of its directory.
    """

    run: str
    job: str
    resumed: bool = False

    def mark(self) -> bytes:
        """Return the content of the MARK file."""
        return (json.dumps({"run": self.run, "job": self.job}) + "\n").encode()

    def made(self, folder: Path) -> bool:
        """Whether this run made the export in `folder`: two of run directory, job digest and `resumed` must agree.

        So a run may be moved, or resumed with a changed setting.
        """
        by = made_by(folder)
        if not by:  # written by a version without this content
            return self.resumed
        return (by.get("run") == self.run) + (by.get("job") == self.job) + self.resumed >= 2


def made_by(folder: Path) -> dict[str, Any]:
    """Read an export's MARK file: {"run": ..., "job": ...}; empty where there is none."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return mark if isinstance(mark, dict) else {}


def check_target(folder: Path, source: Path, *, overwrite: bool, owner: Owner | None = None) -> None:
    """Raise UserError unless `folder` is missing, empty or, with `overwrite`, an earlier export (of `owner`)."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_mount():
        raise UserError(f"{folder} is a disk of its own, which cannot be renamed; must be a new directory inside it")
    if not folder.is_dir() or folder.is_symlink():
        raise UserError(f"{folder} exists and is not a directory; must be a new or empty directory")
    if folder.resolve() == source.resolve():
        raise UserError(f"{folder} is the model the export starts from; must be another directory")
    if not any(folder.iterdir()):
        return
    allowed = "a new or empty directory" + (", or an earlier export" if overwrite else "")
    if not (overwrite and is_export(folder)):
        raise UserError(f"{folder} exists and is not empty; must be {allowed}")
    if owner is not None and not owner.made(folder):
        by = made_by(folder).get("run")
        problem = "does not say which run made it" if by is None else f"is another job's, whose run.dir is {by}"
        problem = "is of this run.dir's job before its settings or data changed" if by == owner.run else problem
        raise UserError(f"{folder} {problem}; must be {allowed} of this run")


def is_export(folder: Path) -> bool:
    """Whether the directory is an earlier export and holds no other files, which replacing it would delete."""
    named = {MARK, "config.json", INDEX, *(path.name for path in folder.glob("*.safetensors"))}
    named |= {path.relative_to(folder).parts[0] for path in companions(folder)}
    adapter = folder / ADAPTER
    if adapter.is_dir() and all(path.name in ADAPTER_FILES for path in adapter.iterdir()):
        named.add(ADAPTER)
    return (folder / MARK).is_file() and all(path.name in named for path in folder.iterdir())
