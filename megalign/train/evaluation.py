"""Evaluates on held-out data: before the first step, after the last, and every `eval.every` steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megalign.config.job import JobConfig
from megalign.engines.build import packing_of
from megalign.engines.protocol import Engine
from megalign.engines.step import evaluate
from megalign.rollout.prompts import Prompt
from megalign.train.feeds import DatasetFeed
from megalign.train.group_source import GroupSource

Evaluation = Callable[[], dict[str, float]]  # metrics `eval_...` under the live weights; called on every rank


def evaluation_due(cfg: JobConfig, step: int, num_steps: int) -> bool:
    """Tell whether the held-out data are evaluated after this many steps."""
    if cfg.eval.path is None:
        return False
    return step in (0, num_steps) or (cfg.eval.every > 0 and step % cfg.eval.every == 0)


def evaluation_left(cfg: JobConfig, step: int, num_steps: int) -> bool:
    """Tell whether a run that has taken this many steps evaluates the held-out data again."""
    return any(evaluation_due(cfg, later, num_steps) for later in range(step + bool(step), num_steps + 1))


def held_out_loss(cfg: JobConfig, engine: Engine, held_out: DatasetFeed) -> dict[str, float]:
    """Return the loss of held-out records and its metrics."""
    result = evaluate(engine, held_out.whole(), cfg.loss, packing=packing_of(cfg))
    return {"eval_loss": result.loss, **{f"eval_{name}": value for name, value in result.metrics.items()}}


def held_out_reward(source: GroupSource, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Return the mean reward of greedy responses to held-out prompts."""
    return {"eval_reward": source.mean_reward(prompts)}
