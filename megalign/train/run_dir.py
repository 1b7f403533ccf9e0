"""The run directory when a job starts: what an earlier job left there is kept aside, never trained over."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megalign.config import JobConfig, dump_config, load_config
from megalign.convert.writer import is_export
from megalign.schema import UserError
from megalign.train.checkpoint import NAME, newer_than, write_latest

FOLDERS = ("checkpoints", "steps", "tensorboard")
FILES = ("metrics.jsonl", "log.txt", "config.yaml", "status.json")


def check_run_dir(run_dir: Path) -> None:
    """Refuse a run directory that cannot be made or written, or in which something else has a name that is needed."""
    shown = f"run.dir is {str(run_dir)!r}"
    try:
        for name in (*FOLDERS, *FILES, "rollout.jsonl"):
            path = run_dir / name
            if path.exists() and path.is_dir() != (name in FOLDERS):
                kind = "directory" if name in FOLDERS else "file"
                raise UserError(f"{shown}: {name} in it is something else; must be a {kind} or not there")
        probe(run_dir / "probe")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{shown}: {reason}; must be a directory that can be written") from None


def check_config_file(run_dir: Path) -> None:
    """Refuse to write the run's configuration over a config.yaml that no run wrote, such as the user's own."""
    path = run_dir / "config.yaml"
    if not path.is_file() or (run_dir / "log.txt").exists():  # a run writes log.txt right after config.yaml
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        written = dump_config(load_config(str(path))) == text
    except UserError:
        written = False
    if not written:
        raise UserError(
            f"run.dir is {str(run_dir)!r}: config.yaml in it was not written by a run, which would write its own over "
            "it; must be another directory, or the file have another name"
        )


def probe(path: Path) -> None:
    """OSError unless a directory can be made at `path`, with all above it; makes none that stays."""
    path = path.absolute()
    above = nearest(path.parent)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.partial-", dir=above) as made:
        (Path(made) / path.parent.relative_to(above) / "x").mkdir(parents=True)


def nearest(path: Path) -> Path:
    """The path itself or the first above it that is there, be it a link to nowhere."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if one.exists() or one.is_symlink())


def holds_training(run_dir: Path) -> bool:
    """Whether a job has trained here: metrics, checkpoints or dumped steps say so."""
    metrics, steps, checkpoints = (run_dir / name for name in ("metrics.jsonl", "steps", "checkpoints"))
    if metrics.is_file() and metrics.stat().st_size > 0:
        return True
    if steps.is_dir() and any(steps.iterdir()):
        return True
    return checkpoints.is_dir() and any(NAME.fullmatch(path.name) for path in checkpoints.iterdir())


def open_run_dir(
    cfg: JobConfig, *, resumed: Path | None, rolled_back: bool, changed: bool, inputs: Sequence[Path]
) -> list[str]:
    """Create the run directory with the resolved configuration; lines for the log about what was kept aside.

    resumed: the checkpoint of this directory that the run goes on from; without one, what another run left is moved
    to `earlier_<n>`, whole. rolled_back: newer checkpoints beside it go there. changed: the job goes on with other
    settings than it began with, so that its metrics and configuration up to now are copied there.
    inputs: what the job reads, which stays where it is.
    """
    run_dir, told = Path(cfg.run.dir), []
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if resumed is None and holds_training(run_dir):
            told.append(_set_aside(run_dir, cfg.export.hf_dir, inputs))
        elif resumed is not None and (rolled_back or changed):
            told += _set_back(run_dir, resumed if rolled_back else None)
        (run_dir / "config.yaml").write_text(dump_config(cfg), encoding="utf-8")
        (run_dir / "status.json").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"run.dir is {cfg.run.dir!r}: {error.strerror}; must be a directory that can be written"
        ) from None
    return told


def _free(run_dir: Path) -> Path:
    """Make the next `earlier_<n>`."""
    number = 1
    while (run_dir / f"earlier_{number}").exists():
        number += 1
    folder = run_dir / f"earlier_{number}"
    folder.mkdir()
    return folder


def _set_aside(run_dir: Path, hf_dir: str | None, inputs: Sequence[Path]) -> str:
    """Move an earlier run's files, and its export where that lies in the directory, out of the new run's way."""
    aside, names = _free(run_dir), list((*FOLDERS, *FILES))
    if hf_dir is not None and is_inside(Path(hf_dir), run_dir) and is_export(Path(hf_dir)):
        names.append(str(Path(hf_dir).resolve().relative_to(run_dir.resolve())))
    moved = []
    for name in names:
        path = run_dir / name
        if path.exists() and not any(is_inside(one, path) for one in inputs):
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            path.rename(aside / name)
            moved.append(name)
    return f"{run_dir} held an earlier run: its {', '.join(moved)} are kept in {aside}"


def _set_back(run_dir: Path, checkpoint: Path | None) -> list[str]:
    """Copy metrics and configuration aside; with a checkpoint, point `latest` at it and move newer ones aside too."""
    aside = _free(run_dir)
    for name in ("metrics.jsonl", "config.yaml"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(run_dir / name, aside / name)
    newer = [] if checkpoint is None else newer_than(checkpoint)
    if checkpoint is not None and newer:
        write_latest(checkpoint.parent, checkpoint.name)  # first: from here on nothing goes on from the newer ones
        (aside / "checkpoints").mkdir()
        for path in newer:
            path.rename(aside / "checkpoints" / path.name)
        write_latest(aside / "checkpoints", newer[-1].name)
    names = ", ".join(["metrics.jsonl", "config.yaml", *(path.name for path in newer)])
    return [f"what the run had before it goes on from here is kept in {aside}: {names}"]


def holds_own(run_dir: Path, path: Path) -> bool:
    """Whether a path is the run directory, is around it, or belongs to what this or an earlier run keeps in it."""
    if is_inside(run_dir, path):
        return True
    inside = path.resolve().relative_to(run_dir.resolve()).parts[0] if is_inside(path, run_dir) else ""
    return inside in (*FOLDERS, *FILES, "rollout.jsonl") or re.fullmatch(r"earlier_\d+", inside) is not None


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path is a directory or lies in it."""
    path, folder = path.resolve(), folder.resolve()
    return path == folder or folder in path.parents
