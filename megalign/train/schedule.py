"""Computes each step's learning rate, and what a changed run length means for a resumed run."""

from __future__ import annotations

import math

from megalign.config.job import JobConfig
from megalign.config.sections import OptimizerSection

AUTO_EVERY = 200  # steps between checkpoints where `checkpoint.every` is not given: half an hour at 9 seconds a step


def learning_rate(cfg: OptimizerSection, step: int, num_steps: int) -> float:
    """Return the rate at `step` (from 1): linear warm-up, then constant, cosine or linear to `min_lr` at the last."""
    schedule = cfg.schedule
    if step <= schedule.warmup_steps:
        return cfg.lr * step / schedule.warmup_steps
    if schedule.name == "constant":
        return cfg.lr
    done = (step - schedule.warmup_steps) / max(1, num_steps - schedule.warmup_steps)
    left = 1 - done if schedule.name == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return schedule.min_lr + (cfg.lr - schedule.min_lr) * left


def save_every(cfg: JobConfig, num_steps: int | None) -> int:
    """Return the steps between checkpoints, 0 for none; without `checkpoint.every` only longer runs have any."""
    every = cfg.checkpoint.every
    if every is not None:
        return every
    return AUTO_EVERY if num_steps is not None and num_steps > AUTO_EVERY else 0


def keeps_last(cfg: JobConfig, num_steps: int | None) -> bool:
    """Tell whether the last step is saved: if checkpoints are on, or nothing else would keep the model.

    num_steps: of the run; None where it is not known yet.
    """
    return bool(save_every(cfg, num_steps)) or cfg.export.hf_dir is None


def resume_lines(cfg: JobConfig, step: int, num_steps: int, num_steps_before: int | None) -> list[str]:
    """Return log lines for a run resumed after `step`: that no steps are left, or that its rate jumps.

    num_steps_before: the run's length when the checkpoint was saved, where that is known.
    """
    length = "run.steps" if cfg.run.steps is not None else "run.epochs" if cfg.rollout is None else "rollout.rounds"
    if step >= num_steps:
        return [
            f"no steps are left: the checkpoint is after step {step} and {length} makes {num_steps} steps; to train "
            f"on, raise {length}; to train anew, give another run.dir or checkpoint.resume=never"
        ]
    if num_steps_before is None or num_steps_before == num_steps:
        return []
    lengths = (num_steps, num_steps_before)
    now, then = (learning_rate(cfg.optimizer, min(step + 1, total), total) for total in lengths)
    if now == then:
        return []
    return [
        f"the run was {num_steps_before} steps long and now is {num_steps}: the learning rate of step {step + 1} is "
        f"{now:.4g} instead of {then:.4g}"
    ]
