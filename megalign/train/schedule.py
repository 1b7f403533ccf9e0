"""The learning rate of a step, which every engine takes from here, and what a run's length means to a resumed one."""

from __future__ import annotations

import math

from megalign.config import JobConfig
from megalign.sections import OptimizerSection


def learning_rate(cfg: OptimizerSection, step: int, num_steps: int) -> float:
    """Rate at `step` (from 1): linear warm-up, then constant, or cosine or linear down to `min_lr` at the last step."""
    schedule = cfg.schedule
    if step <= schedule.warmup_steps:
        return cfg.lr * step / schedule.warmup_steps
    if schedule.name == "constant":
        return cfg.lr
    done = (step - schedule.warmup_steps) / max(1, num_steps - schedule.warmup_steps)
    left = 1 - done if schedule.name == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return schedule.min_lr + (cfg.lr - schedule.min_lr) * left


def keeps_last(cfg: JobConfig) -> bool:
    """Whether a checkpoint follows the last step: where checkpoints are wanted, or nothing else would be kept."""
    return bool(cfg.checkpoint.every) or cfg.export.hf_dir is None


def resume_lines(cfg: JobConfig, step: int, num_steps: int, num_steps_before: int | None) -> list[str]:
    """Lines for the log of a run resumed after `step`: that no steps are left, or that its rate jumps.

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
