"""Writes the checkpoints of a run directory.

A checkpoint is written under a temporary name, synced, renamed, and then `latest` points to it. What fails before that
leaves the earlier checkpoints as they are. Every function here is called on every rank; rank 0 alone touches the
directory, apart from what the engine writes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalign.convert.megatron.checkpoint_dir import FACTS, POINTER, replaced_path
from megalign.engines.protocol import Engine
from megalign.engines.saving import Saving, Written, listing
from megalign.files import move, need_room, sync_all, write_unsynced, write_whole, writing
from megalign.runtime.ranks import gather, gather_on_main, on_every_rank
from megalign.schema import UserError
from megalign.train.checkpoint_facts import FORMAT, Facts
from megalign.train.checkpoint_files import FILES, NAME, check_undamaged, file_sizes, shown_name
from megalign.train.round_file import ROUND, round_text

CONFIG = "config.yaml"
OWN_BYTES = 1 << 20  # at most, of what is written beside tensors and the round in progress


@dataclass(frozen=True, slots=True)
class Target:
    """Describes a checkpoint to write, `checkpoints/step_<step>`, and which older ones it leaves.

    The newest `keep` that are whole stay, and every `keep_every`-th step's. damaged: some that are known not to be; the
    others' small files and sizes are looked at. feed: the state of the data's feed, needed on rank 0.
    config: the job's configuration as text, if it is to be kept. spare: the directory that `checkpoint.resume` names,
    which a restart must find again.
    """

    run_dir: Path
    step: int
    facts: Facts
    keep: int
    keep_every: int
    spare: str | None
    feed: dict[str, Any]
    config: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)  # of what computes numbers here
    damaged: frozenset[Path] = frozenset()

    @property
    def folder(self) -> Path:
        """Return the directory of all checkpoints."""
        return self.run_dir / "checkpoints"

    @property
    def final(self) -> Path:
        """Return the checkpoint's path."""
        return self.folder / f"step_{self.step:08d}"

    @property
    def partial(self) -> Path:
        """Return the path that it has while it is written."""
        return self.folder / f".step_{self.step:08d}.partial"


def save_checkpoint(engine: Engine, target: Target, extra: dict[str, Any]) -> list[str]:
    """Write a checkpoint and drop older ones, as `Target` says; where that fails, remove it and raise SharedError.

    Return on rank 0 a line for each older one that could not be removed.
    """
    with removed_on_failure(target):
        saving = begin(engine, target, extra, copied=False)
        return finish(target, saving, saving.write)


@contextmanager
def removed_on_failure(target: Target) -> Iterator[None]:
    """Remove what was written of a checkpoint where the block, which all ranks leave alike, raises UserError."""
    try:
        yield
    except UserError:
        if dist.get_rank() == 0:
            shutil.rmtree(target.partial, ignore_errors=True)
        raise


def begin(engine: Engine, target: Target, extra: dict[str, Any], *, copied: bool) -> Saving:
    """Make the folder and let the engine prepare to write; SharedError where it cannot be made, or has no room."""
    main = dist.get_rank() == 0
    text = round_text(target.feed) if main else ""

    def make_folder() -> None:
        with writing(target.partial):
            _clear_leftovers(target.folder)
            target.partial.mkdir(parents=True)

    on_every_rank(make_folder if main else lambda: None)
    saving = engine.begin_save(target.partial, extra, copied=copied)
    num_bytes = sum(gather(saving.num_bytes + len(text)))

    def write_round() -> None:
        # Older checkpoints are dropped only when this one is complete, so that their room is not to be had yet.
        with writing(target.partial):
            need_room(target.partial, num_bytes + OWN_BYTES, what=target.final)
        if text:
            with writing(target.partial / ROUND):
                write_unsynced(target.partial / ROUND, text)

    on_every_rank(write_round if main else lambda: None)
    return saving


def finish(target: Target, saving: Saving, write: Callable[[], Written]) -> list[str]:
    """Write this rank's files with `write`, and complete the checkpoint; SharedError where that fails on any rank.

    Return on rank 0 a line for each older one that could not be removed.
    """
    written = gather_on_main(on_every_rank(write))
    return on_every_rank((lambda: _publish(target, saving, written)) if dist.get_rank() == 0 else lambda: [])


def _publish(target: Target, saving: Saving, written: Sequence[Written]) -> list[str]:
    """Add what describes the checkpoint, give it its name, and drop older ones; UserError where it gets no name.

    Return lines about what could not be removed.
    """
    folder, partial, final = target.folder, target.partial, target.final
    saving.finish([each.about for each in written])
    with writing(final):
        facts = {"format": FORMAT, **asdict(target.facts), "versions": dict(target.versions)}
        write_unsynced(partial / FACTS, json.dumps(facts, indent=1))
        if target.config:
            write_unsynced(partial / CONFIG, target.config)
        files = {name: found for each in written for name, found in each.files.items()}
        others = [name for name in file_sizes(partial) if name not in files]
        write_unsynced(partial / FILES, json.dumps({**files, **listing(partial, others)}))
        folders = [path for path in partial.rglob("*") if path.is_dir()]
        # Those of the ranks are synced by them.
        sync_all([*(partial / name for name in (*others, FILES)), *folders, partial])
        replaced = None
        if os.path.lexists(final):
            # Of a run that took this step before; renamed, it still counts until the new one does.
            replaced = move(final, replaced_path(final))
        move(partial, final)
        write_latest(folder, final.name)
    # From here on it is saved, whatever becomes of others.
    kept = [] if replaced is None else [_remove(replaced)]
    return list(filter(None, [*kept, *_drop_old(target)]))


def _remove(path: Path) -> str:
    """Remove a folder or whatever has its name; return a line where that fails, else ""."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        return f"{path} cannot be removed: {error.strerror or error}"
    return ""


def _clear_leftovers(folder: Path) -> None:
    """Remove what killed saves left; a checkpoint that was renamed to be replaced gets its name back.

    What cannot be removed, such as files that another process of a network file system still reads, stays.
    """
    for replaced in folder.glob(".step_*.replaced"):
        final = folder / shown_name(replaced)
        if os.path.lexists(final) or not replaced.is_dir():
            _remove(replaced)
        else:
            move(replaced, final)
    for leftover in [*folder.glob(".step_*.partial"), *folder.glob(".step_*.dropped")]:
        _remove(leftover)


def write_latest(folder: Path, name: str) -> None:
    """Point `latest` at a checkpoint, atomically."""
    write_whole(folder / POINTER, json.dumps({"checkpoint": name}))


def _drop_old(target: Target) -> Iterator[str]:
    """Remove this run's older checkpoints, and yield lines about those that cannot be.

    Later steps are an earlier run's and stay until this one gets there. A damaged one takes no other's place.
    """
    steps = sorted(int(match[1]) for path in target.folder.iterdir() if (match := NAME.fullmatch(path.name)))
    whole = 0
    for step in reversed([saved for saved in steps if saved <= target.step]):
        path = target.folder / f"step_{step:08d}"
        if whole < target.keep:
            whole += step == target.step or (path not in target.damaged and _looks_whole(path))
        elif not (target.keep_every and step % target.keep_every == 0) and os.path.realpath(path) != target.spare:
            yield _drop(path)


def _looks_whole(checkpoint: Path) -> bool:
    try:
        check_undamaged(checkpoint)
    except UserError:
        return False
    return True


def _drop(checkpoint: Path) -> str:
    """Remove a checkpoint: renamed first, so that none that counts lacks files; return a line where that fails.

    One whose folders are read-only stays: somebody protects it, and half of it would be worth nothing.
    """
    try:
        folders = [checkpoint, *(path for path in checkpoint.rglob("*") if path.is_dir())]
        if not all(os.access(folder, os.R_OK | os.W_OK | os.X_OK) for folder in folders):
            return ""
        return _remove(move(checkpoint, checkpoint.with_name(f".{checkpoint.name}.dropped")))
    except OSError as error:
        return f"{checkpoint} cannot be removed: {error.strerror or error}"


def remove(checkpoint: Path) -> str:
    """Remove a checkpoint, and the folder of all of them where it was the only one; return a line where that fails."""
    folder = checkpoint.parent
    others = sorted(path.name for path in folder.iterdir() if NAME.fullmatch(path.name) and path != checkpoint)
    try:
        if others:
            write_latest(folder, others[-1])
        else:
            (folder / POINTER).unlink()
    except OSError as error:
        return f"{checkpoint} cannot be removed: {error.strerror or error}"
    problem = _drop(checkpoint)
    if not others:
        with suppress(OSError):  # somebody has put a file there
            folder.rmdir()
    return problem
