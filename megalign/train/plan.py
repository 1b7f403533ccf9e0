"""Say before the first step how long a run is and what it evaluates."""

from __future__ import annotations

from megalign.config import JobConfig


def run_plan(cfg: JobConfig, num_steps: int, size: int) -> str:
    """Say how many steps there are and how often they go through the data; `size`: groups of an epoch, or prompts."""
    rollout, groups_per_step = cfg.rollout, cfg.data.groups_per_step or 0
    if rollout is None:
        taken = num_steps * groups_per_step
        return f"{num_steps} steps of {groups_per_step} groups: {taken / size:.2f} epochs of {size} groups"
    taken = rollout.rounds * rollout.prompts_per_round
    return (
        f"{rollout.rounds} rounds of {rollout.prompts_per_round} prompts with {rollout.k} responses each, "
        f"{rollout.updates_per_round} updates of {groups_per_step} groups a round: {num_steps} steps, "
        f"{taken / size:.2f} epochs of {size} prompts"
    )


def evaluation_plan(cfg: JobConfig, num_steps: int, num_held_out: int) -> str:
    """Say what is evaluated, when, and how often in a whole run."""
    every = cfg.eval.every
    count = 2 + ((num_steps - 1) // every if every else 0)
    what = "records" if cfg.rollout is None else "prompts"
    when = f"every {every} steps" if every else "at no step between, since eval.every is 0"
    always = "before the first step, after the last"
    return f"evaluation on {num_held_out} {what} of {cfg.eval.path}: {always}, {when}; {count} in all"
