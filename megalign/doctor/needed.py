"""Computes what a job writes to its disks, and reads the model that it is computed from, without any download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megalign.config.job import JobConfig
from megalign.convert.hf.model import HFModel, read_model
from megalign.convert.hf.reader import cached_model
from megalign.engines.build import engine_package
from megalign.schema import UserError
from megalign.train.checkpoint_files import NAME
from megalign.train.outputs import export_bytes
from megalign.train.schedule import keeps_last, save_every

FILES_A_RANK, OTHER_FILES = 2, 12  # of a checkpoint


@dataclass(frozen=True, slots=True)
class Written:
    """Says what a job writes: bytes of a checkpoint, how many more of them the disk must hold, bytes of an export."""

    checkpoint: int
    num_checkpoints: int
    export: int

    @property
    def in_words(self) -> str:
        """Return what there is, as text."""
        count = self.num_checkpoints
        return f"{'a checkpoint' if count == 1 else f'{count} checkpoints'} of {gigabytes(self.checkpoint)}"


def model_of(cfg: JobConfig) -> HFModel | None:
    """Return the job's model where its config.json can be read here; the weights need not be there."""
    folder = cached_model(cfg.model.path)
    try:
        return None if folder is None else read_model(folder)
    except UserError:
        return None


def written(cfg: JobConfig, model: HFModel) -> Written:
    """Return what a job that starts, or goes on, in its run directory writes."""
    export = 0 if cfg.export.hf_dir is None else export_bytes(cfg, model)
    return Written(engine_package(cfg).checkpoint_bytes(cfg, model), _num_checkpoints(cfg), export)


def _num_checkpoints(cfg: JobConfig) -> int:
    """Return how many checkpoints there will be at once, less those that are there already."""
    keep, steps = cfg.checkpoint, _num_steps(cfg)
    every = save_every(cfg, steps)
    saved = None if steps is None else (steps // every if every else 0) + keeps_last(cfg, steps)
    if not every:
        count = 1  # after the last step, or when the job is stopped
    elif saved is None:
        count = keep.keep + 1  # the oldest is dropped only when the next is complete
    else:
        count = max(1, min(keep.keep + 1, saved))
    if every and keep.keep_every and steps is not None:
        count += sum(step % keep.keep_every == 0 for step in range(every, steps + 1, every))
    folder = Path(cfg.run.dir) / "checkpoints"
    there = sum(NAME.fullmatch(path.name) is not None for path in folder.iterdir()) if folder.is_dir() else 0
    return max(0, count - there)


def _num_steps(cfg: JobConfig) -> int | None:
    """Return the job's number of steps; None where it depends on the number of records."""
    if cfg.rollout is not None:
        return cfg.rollout.rounds * cfg.rollout.updates_per_round
    return cfg.run.steps


def num_writers(cfg: JobConfig, world_size: int) -> int:
    """Return how many ranks share the writing of a checkpoint: with DeepSpeed all, else one for each part."""
    return world_size if cfg.engine.name == "deepspeed" else cfg.parallel.tensor * cfg.parallel.pipeline


def gigabytes(num_bytes: float) -> str:
    """Return a size as text: `16.1 GB`, `350 MB`, `12 kB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.3g} {unit}" if num_bytes < 100 * size else f"{num_bytes / size:,.0f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"
