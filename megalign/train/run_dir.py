"""Prepares the run directory when a job starts; what an earlier job left there is moved aside, never overwritten."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megalign.config.job import JobConfig, dump_config, load_config
from megalign.convert.hf.export_dir import is_export
from megalign.convert.megatron.checkpoint_dir import POINTER
from megalign.files import move, write_whole
from megalign.rollout.command import ROLLOUT_FILE
from megalign.runtime.hang_report import FOLDER as HANG_REPORT
from megalign.schema import UserError
from megalign.train.checkpoint import write_latest
from megalign.train.checkpoint_files import NAME, shown_name
from megalign.train.cut_back import later_dumps
from megalign.train.resume_point import checkpoints_in, newer_than, pointed_to
from megalign.train.trackers import WANDB_ID

SCORES = "scores"  # made before the first step
FOLDERS = ("checkpoints", "steps", "tensorboard", SCORES, HANG_REPORT)
GROWING = ("metrics.jsonl", "log.txt")
FILES = (*GROWING, "config.yaml", "status.json", WANDB_ID)
OWN = (*FOLDERS, *FILES, ROLLOUT_FILE)  # all names that a job, or the command rollout, writes in a run directory


def check_run_dir(run_dir: Path) -> None:
    """Refuse a run directory that cannot be made or written, or in which a needed name is of another kind."""
    shown = f"run.dir is {str(run_dir)!r}"
    try:
        for name in OWN:
            path = run_dir / name
            if os.path.lexists(path) and not (path.is_dir() if name in FOLDERS else path.is_file()):
                kind = "directory" if name in FOLDERS else "file"
                raise UserError(f"{shown}: {name} in it is something else; must be a {kind} or not there")
        if os.path.lexists(latest := run_dir / "checkpoints" / POINTER) and not latest.is_file():
            raise UserError(f"{shown}: checkpoints/{POINTER} in it is something else; must be a file or not there")
        for name in GROWING:
            if (run_dir / name).exists() and not os.access(run_dir / name, os.R_OK | os.W_OK):
                raise UserError(f"{shown}: {name} in it may not be read and written; must be a file that may")
        if (run_dir / "checkpoints").exists() and not os.access(run_dir / "checkpoints", os.R_OK | os.W_OK | os.X_OK):
            raise UserError(f"{shown}: checkpoints in it may not be read and written; must be a directory that may")
        probe(run_dir / "probe")
    except (OSError, ValueError) as error:
        raise _unwritable(run_dir, error) from None


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
            f"run.dir is {str(run_dir)!r}: config.yaml in it was not written by a run, and a run would overwrite it; "
            "must be another directory, or the file must have another name"
        )


def probe(path: Path) -> None:
    """Raise OSError unless a directory and its parents can be made at `path`; leaves nothing behind."""
    path = path.absolute()
    above = nearest(path.parent)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.partial-", dir=above) as made:
        (Path(made) / path.parent.relative_to(above) / "x").mkdir(parents=True)


def nearest(path: Path) -> Path:
    """Return the path or its nearest parent that exists; a broken link counts as existing."""
    path = path.absolute()
    return next(above for above in (path, *path.parents) if above.exists() or above.is_symlink())


def holds_training(run_dir: Path) -> bool:
    """Tell whether a job has trained here: there are metrics, checkpoints or dumped steps."""
    metrics, steps, checkpoints = (run_dir / name for name in ("metrics.jsonl", "steps", "checkpoints"))
    if metrics.is_file() and metrics.stat().st_size > 0:
        return True
    if steps.is_dir() and any(steps.iterdir()):
        return True
    return checkpoints.is_dir() and any(NAME.fullmatch(path.name) for path in checkpoints.iterdir())


def open_run_dir(
    cfg: JobConfig, *, resumed: Path | None, rolled_back: bool, changed: bool, inputs: Sequence[Path]
) -> list[str]:
    """Create the run directory with the resolved configuration; return log lines about what was moved aside.

    resumed: the checkpoint of this directory that the run resumes from; if None, everything of an earlier run is moved
    to `earlier_<n>`. rolled_back: newer checkpoints beside `resumed` are moved there. changed: the job resumes with
    other settings, so its metrics and configuration up to now are copied there. inputs: the job's input files, which
    are never moved.
    """
    run_dir, lines = Path(cfg.run.dir), []
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if resumed is None and holds_training(run_dir):
            lines.append(_set_aside(run_dir, cfg.export.hf_dir, inputs))
        elif resumed is not None and (rolled_back or changed):
            lines += _set_back(run_dir, resumed if rolled_back else None)
        if resumed is not None and pointed_to(resumed.parent) != shown_name(resumed):
            write_latest(resumed.parent, shown_name(resumed))  # for tools, which take what it names
        write_whole(run_dir / "config.yaml", dump_config(cfg))
        (run_dir / "status.json").unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(run_dir, error) from None
    return lines


@contextlib.contextmanager
def alone_in(run_dir: Path, *, patience_s: float) -> Iterator[None]:
    """Make a run directory this job's own for the block, after waiting so long for another job to end.

    UserError where that goes on: two jobs would take each other's files away. On a file system without locks each job
    has it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _unwritable(run_dir, error) from None
    try:
        until = time.monotonic() + patience_s
        while not _locked(handle) and time.monotonic() < until:
            time.sleep(0.1)
        if not _locked(handle):
            raise UserError(
                f"run.dir is {str(run_dir)!r}: another job that runs, or a process that it left behind, has it; must "
                "be another directory, or that must end first"
            )
        yield
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        pass
    return True


def _unwritable(run_dir: Path, error: OSError | ValueError) -> UserError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UserError(f"run.dir is {str(run_dir)!r}: {reason}; must be a directory that can be written")


def _free(run_dir: Path) -> Path:
    """Create the next unused directory `earlier_<n>`."""
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
    if any(is_inside(source, run_dir / "checkpoints") for source in inputs):
        # The rest of them must not be taken for the new run's.
        names += [f"checkpoints/{path.name}" for path in checkpoints_in(run_dir / "checkpoints")]
    moved = []
    for name in names:
        path = run_dir / name
        if path.exists() and not any(is_inside(source, path) for source in inputs):
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            move(path, aside / name)
            moved.append(name)
    return f"{run_dir} held an earlier run: its {', '.join(moved)} are kept in {aside}"


def _set_back(run_dir: Path, checkpoint: Path | None) -> list[str]:
    """Copy metrics and configuration aside; with a checkpoint, point `latest` at it and move newer ones aside too."""
    aside = _free(run_dir)
    for name in ("metrics.jsonl", "config.yaml"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(run_dir / name, aside / name)
    if (run_dir / WANDB_ID).exists():  # the steps that are taken again go to another run there
        move(run_dir / WANDB_ID, aside / WANDB_ID)
    newer = [] if checkpoint is None else newer_than(checkpoint)
    if checkpoint is not None and newer:
        # First, so that from now on no run resumes from the newer ones.
        write_latest(checkpoint.parent, checkpoint.name)
        (aside / "checkpoints").mkdir()
        for path in newer:
            move(path, aside / "checkpoints" / path.name)
        write_latest(aside / "checkpoints", newer[-1].name)
        _keep_dumps(run_dir, aside, int(shown_name(checkpoint).removeprefix("step_")))
    names = ", ".join(["metrics.jsonl", "config.yaml", *(path.name for path in newer)])
    return [f"the run's state before this resume is kept in {aside}: {names}"]


def _keep_dumps(run_dir: Path, aside: Path, step: int) -> None:
    """Move the dumps of steps after `step` aside."""
    for path in later_dumps(run_dir, step):
        (aside / "steps").mkdir(exist_ok=True)
        move(path, aside / "steps" / path.name)


def holds_own(run_dir: Path, path: Path) -> bool:
    """Tell whether a path is or contains the run directory, or is something that a run keeps in it."""
    if is_inside(run_dir, path):
        return True
    own, real = Path(os.path.realpath(run_dir)), Path(os.path.realpath(path))
    inside = real.relative_to(own).parts[0] if is_inside(real, own) else ""
    return inside in OWN or re.fullmatch(r"earlier_\d+", inside) is not None


def is_inside(path: Path, folder: Path) -> bool:
    """Tell whether a path is the directory `folder` or lies in it."""
    path, folder = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return path == folder or folder in path.parents
