"""One round: every rank samples its share of the prompts and rewards it, and all ranks end with the same groups."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalign.rollout.ends import NO_END
from megalign.rollout.prompts import Prompt, plain_text
from megalign.rollout.rewards import Reward
from megalign.rollout.sample import Sampled, sample
from megalign.schema import UserError

Gather = Callable[[Any], list[Any]]  # one object of every rank, in rank order, on every rank


@dataclass(frozen=True, slots=True)
class Round:
    """`records` are groups in the input format for rewarded samples, in prompt order; `stats` go to the metrics."""

    records: list[dict[str, Any]]
    stats: dict[str, float]


def rollout_round(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    reward: Reward,
    k: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    round_number: int,
    rank: int = 0,
    num_ranks: int = 1,
    gather: Gather | None = None,
    token_budget: int = 65536,
) -> Round:
    """Sample, reward and collect the round's prompts; the records are the same for any number of ranks.

    model: a whole `transformers` model on every rank. gather: needed where there are several ranks.
    """
    start = time.perf_counter()
    mine = range(rank, len(prompts), num_ranks)
    try:
        ends = end_ids(model, tokenizer)
        samples = sample(
            model,
            [prompts[place].ids for place in mine],
            seeds=[(seed, round_number, place) for place in mine],
            k=k,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            eos_ids=ends,
            pad_id=ends[0],  # masked out, so any token that the model has; the tokenizer's may be one that it lacks
            token_budget=token_budget,
        )
        share: Any = [
            (place, _reward_group(prompts[place], group, tokenizer, reward)) for place, group in zip(mine, samples)
        ]
    except UserError as error:
        share = str(error)  # gathered like a result, so that no rank waits for one that has stopped
    shares = gather(share) if gather is not None else [share]
    for problem in shares:
        if isinstance(problem, str):
            raise UserError(problem)
    groups = [group for _, group in sorted((pair for part in shares for pair in part), key=lambda pair: pair[0])]
    return Round([record for record, _ in groups], _statistics(groups, seconds=time.perf_counter() - start))


def end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's, and those of the model's generation settings (end of turn)."""
    more = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}
    if not ends:
        raise UserError(NO_END)
    return tuple(sorted(ends))


def _reward_group(
    prompt: Prompt, group: Sequence[Sampled], tokenizer: Any, reward: Reward
) -> tuple[dict[str, Any], int]:
    """The group's record, and how many of its responses were cut short."""
    responses = [
        {
            "response_ids": list(response.ids),
            "reward": reward(prompt.text, plain_text(tokenizer, response.ids), prompt.record, prompt.where),
            "logp": list(response.logp),
        }
        for response in group
    ]
    record = {"prompt_ids": list(prompt.ids), "responses": responses}
    return record, sum(not response.finished for response in group)


def _statistics(groups: Sequence[tuple[dict[str, Any], int]], *, seconds: float) -> dict[str, float]:
    rewards = [[response["reward"] for response in record["responses"]] for record, _ in groups]
    lengths = [len(response["response_ids"]) for record, _ in groups for response in record["responses"]]
    return {
        "reward_mean": sum(map(sum, rewards)) / len(lengths),
        "equal_reward_fraction": sum(max(group) == min(group) for group in rewards) / len(rewards),
        "response_length_mean": sum(lengths) / len(lengths),
        "unfinished_fraction": sum(cut for _, cut in groups) / len(lengths),
        "rollout_seconds": seconds,
    }


def write_groups(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write groups as JSONL that `data.path` accepts, the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
