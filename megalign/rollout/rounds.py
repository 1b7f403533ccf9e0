"""Runs one round: each rank samples and rewards its share of the prompts, then all ranks gather the same groups.

Each gathered record is valid training data: `prompt_ids`, and `responses` with `response_ids`, `reward`, `logp` (at
`temperature`) and `finished`. For readers it also holds the texts, and the prompt's own record under `record`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalign.data.group import same_rewards
from megalign.rollout.ends import NO_END
from megalign.rollout.prompts import Prompt, plain_text
from megalign.rollout.rewards import LIMIT_S, Reward
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
    reward_limit_s: float = LIMIT_S,
) -> Round:
    """Sample, reward and collect the round's prompts; the records are the same for any number of ranks.

    model: a whole `transformers` model on every rank. gather: needed where there are several ranks. reward_limit_s:
    for one call of the reward; the other ranks wait for it, so it must be less than they wait for each other.
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
            (place, _reward_group(prompts[place], group, tokenizer, reward, limit_s=reward_limit_s))
            for place, group in zip(mine, samples)
        ]
    except UserError as error:
        share = str(error)  # gathered like a result, so that no rank waits for one that has stopped
    shares = gather(share) if gather is not None else [share]
    for problem in shares:
        if isinstance(problem, str):
            raise UserError(problem)
    groups = [group for _, group in sorted((pair for part in shares for pair in part), key=lambda pair: pair[0])]
    records = [
        {
            "prompt_ids": list(prompt.ids),
            "prompt_text": prompt.text,
            "responses": responses,
            "temperature": temperature or 1.0,  # greedy responses are scored at 1
            "record": dict(prompt.record),
        }
        for prompt, responses in zip(prompts, groups, strict=True)
    ]
    return Round(records, _statistics(groups, seconds=time.perf_counter() - start))


def without_texts(record: dict[str, Any]) -> dict[str, Any]:
    """Strip a round's record to the fields that training reads."""
    responses = [
        {name: value for name, value in response.items() if name != "response_text"} for response in record["responses"]
    ]
    return {"prompt_ids": record["prompt_ids"], "responses": responses, "temperature": record["temperature"]}


def end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end a response: the tokenizer's EOS and those of the generation settings (end of turn)."""
    more = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}
    if not ends:
        raise UserError(NO_END)
    return tuple(sorted(ends))


def _reward_group(
    prompt: Prompt, group: Sequence[Sampled], tokenizer: Any, reward: Reward, *, limit_s: float
) -> list[dict[str, Any]]:
    """Reward a prompt's responses and return them as `responses` of a record."""
    responses = []
    for response in group:
        text = plain_text(tokenizer, response.ids)
        responses.append(
            {
                "response_ids": list(response.ids),
                "response_text": text,
                "reward": reward(prompt.text, text, prompt.record, prompt.where, limit_s=limit_s),
                "logp": list(response.logp),
                "finished": response.finished,
            }
        )
    return responses


def _statistics(groups: Sequence[list[dict[str, Any]]], *, seconds: float) -> dict[str, float]:
    responses = [response for group in groups for response in group]
    rewards = [[response["reward"] for response in group] for group in groups]
    lengths = [len(response["response_ids"]) for response in responses]
    return {
        "reward_mean": sum(map(sum, rewards)) / len(lengths),
        "equal_reward_fraction": sum(map(same_rewards, rewards)) / len(rewards),
        "response_length_mean": sum(lengths) / len(lengths),
        "unfinished_fraction": sum(not response["finished"] for response in responses) / len(lengths),
        "rollout_seconds": seconds,
    }


def write_groups(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write groups as JSONL that `data.path` accepts, the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        for record in records:
            # Records of a datasets directory may hold dates and the like, which JSON has no form for.
            file.write(json.dumps(record, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
