"""Describes before the first step how long a run is and what it evaluates."""

from __future__ import annotations

from megalign.config.job import JobConfig
from megalign.train.console import counted


def run_plan(cfg: JobConfig, num_steps: int, size: int) -> str:
    """Say how many steps there are and how often they go through the data; `size`: groups of an epoch, or prompts."""
    rollout, groups_per_step = cfg.rollout, cfg.data.groups_per_step or 0
    if rollout is None:
        taken = num_steps * groups_per_step
        return (
            f"{counted(num_steps, 'step')} of {counted(groups_per_step, 'group')}: {taken / size:.2f} epochs of "
            f"{counted(size, 'group')}"
        )
    taken = rollout.rounds * rollout.prompts_per_round
    return (
        f"{counted(rollout.rounds, 'round')} of {counted(rollout.prompts_per_round, 'prompt')} with "
        f"{counted(rollout.k, 'response')} each, {counted(rollout.updates_per_round, 'update')} of "
        f"{counted(groups_per_step, 'group')} a round: {counted(num_steps, 'step')}, "
        f"{taken / size:.2f} epochs of {counted(size, 'prompt')}"
    )


def evaluation_plan(cfg: JobConfig, num_steps: int, num_held_out: int) -> str:
    """Say what is evaluated, when, and how often in a whole run."""
    every = cfg.eval.every
    count = 2 + ((num_steps - 1) // every if every else 0)
    held_out = counted(num_held_out, "record" if cfg.rollout is None else "prompt")
    when = f"every {every} steps" if every else "at no step between, since eval.every is 0"
    always = "before the first step, after the last"
    return f"evaluation on {held_out} of {cfg.eval.path}: {always}, {when}; {count} in all"
