"""Runs one round: each rank samples and rewards part of the prompts, and all ranks gather all groups.

Each gathered record is valid training data: `prompt_ids`, and `responses` with `response_ids`, `reward`, `logp` (at
`temperature`) and `finished`. For readers it also holds the texts, and the prompt's own record under `record`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megalign.data.group import same_rewards
from megalign.files import write_whole
from megalign.rollout.prompts import Prompt, plain_text
from megalign.rollout.rewards import LIMIT_S, Reward, RewardCall
from megalign.rollout.sampler import Sampled, Sampler, SamplingPlan
from megalign.schema import UserError

Gather = Callable[[Any], list[Any]]  # takes one rank's object, returns those of all ranks in order


@dataclass(frozen=True, slots=True)
class Round:
    """Holds a round's groups in the input format for rewarded samples, in prompt order; `stats` go to the metrics."""

    records: list[dict[str, Any]]
    stats: dict[str, float]


def rollout_round(
    sampler: Sampler,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    plan: SamplingPlan,
    *,
    reward: Reward,
    seed: int,
    round_number: int,
    rank: int = 0,
    num_ranks: int = 1,
    gather: Gather | None = None,
    reward_limit_s: float = LIMIT_S,
    beat: Callable[[], None] = lambda: None,
) -> Round:
    """Sample, reward and collect the round's prompts; the records are the same for any number of ranks.

    gather: required with several ranks. reward_limit_s: time limit of one reward call; the other ranks wait meanwhile,
    so it must be shorter than the watchdog's time-out. beat: called for each reward call.
    """
    start = time.perf_counter()
    mine = range(rank, len(prompts), num_ranks)
    try:
        own = [prompts[index] for index in mine]
        seeds = [(seed, round_number, index) for index in mine]
        samples = sampler.sample([prompt.ids for prompt in own], seeds, plan)
        rewarded = _rewarded(own, samples, tokenizer, reward, limit_s=reward_limit_s, beat=beat)
        result: Any = list(zip(mine, rewarded, strict=True))
    except UserError as error:
        result = str(error)  # gathered like a result, so that no rank waits for one that has stopped
    by_rank = gather(result) if gather is not None else [result]
    for problem in by_rank:
        if isinstance(problem, str):
            raise UserError(problem)
    groups = [group for _, group in sorted((pair for part in by_rank for pair in part), key=lambda pair: pair[0])]
    records = [
        {
            "prompt_ids": list(prompt.ids),
            "prompt_text": prompt.text,
            "responses": responses,
            "temperature": plan.temperature or 1.0,  # greedy responses are scored at 1
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


def _rewarded(
    prompts: Sequence[Prompt],
    samples: Sequence[Sequence[Sampled]],
    tokenizer: Any,
    reward: Reward,
    *,
    limit_s: float,
    beat: Callable[[], None],
) -> list[list[dict[str, Any]]]:
    """Reward each prompt's responses and return them as `responses` of a record."""
    texts = [[plain_text(tokenizer, response.ids) for response in group] for group in samples]
    calls = [
        RewardCall(prompt.text, text, prompt.record, prompt.where)
        for prompt, group in zip(prompts, texts, strict=True)
        for text in group
    ]
    rewards = iter(reward.score(calls, limit_s=limit_s, beat=beat))
    return [
        [
            {
                "response_ids": list(response.ids),
                "response_text": text,
                "reward": next(rewards),
                "logp": list(response.logp),
                "finished": response.finished,
            }
            for response, text in zip(responses, group, strict=True)
        ]
        for responses, group in zip(samples, texts, strict=True)
    ]


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
    """Write groups as JSONL that `data.path` accepts, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(file: IO[bytes]) -> None:
        for record in records:
            # Records of a datasets directory may hold values that JSON cannot express, such as dates.
            file.write(f"{json.dumps(record, default=str)}\n".encode())

    write_whole(path, write)
