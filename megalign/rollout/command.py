"""Runs the command `rollout`: samples and rewards responses of a Hugging Face checkpoint and writes them as JSONL."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megalign.config.job import JobConfig
from megalign.files import move
from megalign.rollout.collect import Gather, rollout_round, write_groups
from megalign.rollout.prompts import Prompt, round_prompts
from megalign.rollout.rewards import call_limit_s, choose_reward
from megalign.rollout.sampler import Sampler, SamplingPlan

ROLLOUT_FILE = "rollout.jsonl"


def write_rollouts(
    cfg: JobConfig,
    sampler: Sampler,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    rank: int = 0,
    num_ranks: int = 1,
    gather: Gather | None = None,
    beat: Callable[[], None] = lambda: None,
    between: Callable[[], None] = lambda: None,
    report: Callable[[str], None] = print,
) -> Path:
    """Sample all rounds with the same weights and write `RUN_DIR/rollout.jsonl`, which `data.path` accepts.

    The same seed draws the same samples as in the first round of `train`. Rank 0 writes, after the last round; an
    earlier file of that name is kept as `rollout.<n>.jsonl`. between: called on every rank before each round.
    """
    rollout = cfg.rollout
    assert rollout is not None  # the command has refused a configuration without the section
    reward = choose_reward(rollout.reward)
    plan = SamplingPlan(rollout.k, rollout.temperature, rollout.max_new_tokens)
    records: list[dict[str, Any]] = []
    for round_number in range(rollout.rounds):
        between()
        result = rollout_round(
            sampler,
            tokenizer,
            round_prompts(
                prompts, seed=cfg.run.seed, round_number=round_number, prompts_per_round=rollout.prompts_per_round
            ),
            plan,
            reward=reward,
            seed=cfg.run.seed,
            round_number=round_number,
            rank=rank,
            num_ranks=num_ranks,
            gather=gather,
            reward_limit_s=call_limit_s(cfg.watchdog.timeout_s),
            beat=beat,
        )
        records += result.records
        shown = ", ".join(f"{name} {value:.3g}" for name, value in result.stats.items())
        if rank == 0:
            report(f"round {round_number + 1} of {rollout.rounds}: {shown}")
    path = Path(cfg.run.dir) / ROLLOUT_FILE
    if rank == 0:
        if path.exists():
            numbers = (number for number in itertools.count(1) if not path.with_suffix(f".{number}.jsonl").exists())
            report(f"earlier groups are kept in {move(path, path.with_suffix(f'.{next(numbers)}.jsonl'))}")
        write_groups(path, records)
        report(f"{len(records)} groups in {path}")
    return path
