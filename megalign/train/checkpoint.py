"""Writes the checkpoints of a run directory.

A checkpoint is written under a temporary name, synced, renamed, and then `latest` points to it. Every function here
is called on every rank; rank 0 alone touches the directory, apart from what the engine writes.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalign.convert.megatron.checkpoint_dir import FACTS, POINTER, replaced_path
from megalign.engines.protocol import Engine
from megalign.files import move, sync_tree, write_whole
from megalign.train.checkpoint_facts import FORMAT, Facts
from megalign.train.checkpoint_files import FILES, describe_files
from megalign.train.resume_point import NAME


def save_checkpoint(
    engine: Engine,
    run_dir: Path,
    step: int,
    extra: dict[str, Any],
    *,
    facts: Facts,
    keep: int,
    keep_every: int,
    spare: str | None = None,
) -> Path:
    """Write `checkpoints/step_<step>` and drop older ones: the newest `keep` stay, and every `keep_every`-th step's.

    spare: the directory that `checkpoint.resume` names, which a restart must find again.
    """
    folder = run_dir / "checkpoints"
    final, partial = folder / f"step_{step:08d}", folder / f".step_{step:08d}.partial"
    main = dist.get_rank() == 0
    if main:
        _clear_leftovers(folder)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save(partial, extra)
    dist.barrier()
    if main:
        write_whole(partial / FACTS, json.dumps({"format": FORMAT, **asdict(facts)}, indent=1))
        write_whole(partial / FILES, json.dumps(describe_files(partial)))
        sync_tree(partial)
        replaced = None
        if final.exists():  # of a run that took this step before; renamed, it still counts until the new one does
            replaced = move(final, replaced_path(final))
        move(partial, final)
        write_latest(folder, final.name)
        if replaced is not None:
            shutil.rmtree(replaced)
        _drop_old(folder, step, keep=keep, keep_every=keep_every, spare=spare)
    dist.barrier()
    return final


def _clear_leftovers(folder: Path) -> None:
    """Remove what killed saves left; a checkpoint that was renamed to be replaced gets its name back."""
    for replaced in folder.glob(".step_*.replaced"):
        final = folder / replaced.name.removeprefix(".").removesuffix(".replaced")
        if final.exists():
            shutil.rmtree(replaced)
        else:
            move(replaced, final)
    for leftover in [*folder.glob(".step_*.partial"), *folder.glob(".step_*.dropped")]:
        shutil.rmtree(leftover)


def write_latest(folder: Path, name: str) -> None:
    """Point `latest` at a checkpoint, atomically."""
    write_whole(folder / POINTER, json.dumps({"checkpoint": name}))


def _drop_old(folder: Path, step: int, *, keep: int, keep_every: int, spare: str | None) -> None:
    """Remove this run's older checkpoints; later steps are an earlier run's and stay until this one gets there."""
    steps = sorted(int(match[1]) for path in folder.iterdir() if (match := NAME.fullmatch(path.name)))
    for old in [saved for saved in steps if saved <= step][:-keep]:
        path = folder / f"step_{old:08d}"
        if (keep_every and old % keep_every == 0) or (spare is not None and str(path.resolve()) == spare):
            continue
        shutil.rmtree(move(path, path.with_name(f".{path.name}.dropped")))  # renamed first: no checkpoint lacks files
