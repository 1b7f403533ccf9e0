"""The learning rate of a step; every engine uses this one function."""

from __future__ import annotations

import math

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
