"""Evaluate on held-out data: before the first step, after the last, and every `eval.every` steps."""

from __future__ import annotations

import time
from collections.abc import Sequence

from megalign.config import JobConfig
from megalign.engines.engine import Engine
from megalign.engines.step import evaluate
from megalign.rollout.prompts import Prompt
from megalign.train.feeds import DatasetFeed, Feed
from megalign.train.rounds import RoundFeed, evaluate_reward
from megalign.train.session import cutting_of


def evaluation_due(cfg: JobConfig, step: int, num_steps: int) -> bool:
    """Say whether the held-out data are evaluated after this many steps."""
    if cfg.eval.path is None:
        return False
    return step in (0, num_steps) or (cfg.eval.every > 0 and step % cfg.eval.every == 0)


def held_out_metrics(
    cfg: JobConfig, engine: Engine, feed: Feed, held_out: DatasetFeed | Sequence[Prompt]
) -> dict[str, float]:
    """Evaluate the held-out data under the live weights: metrics `eval_...` and `eval_seconds`; on every rank."""
    began = time.perf_counter()
    if isinstance(feed, RoundFeed):
        assert not isinstance(held_out, DatasetFeed)
        found = evaluate_reward(feed, held_out)
    else:
        assert isinstance(held_out, DatasetFeed)
        result = evaluate(engine, held_out.whole(), cfg.loss, cutting=cutting_of(cfg))
        found = {"eval_loss": result.loss, **{f"eval_{name}": value for name, value in result.metrics.items()}}
    return {**found, "eval_seconds": time.perf_counter() - began}
