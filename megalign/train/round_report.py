"""Describes a sampled round: its numbers in a line, and a prompt with two of its responses as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from megalign.data.group import same_rewards
from megalign.rollout.prompts import plain_text
from megalign.train.console import shown
from megalign.train.reporter import Reporter

MAX_SAMPLES, LEAST_PERIOD = 10, 3  # rough number of samples shown in a run, and least number of rounds between them
HEAD, TAIL = 240, 160  # characters shown of a longer text's start and end, where answers often are


def report_round(
    report: Reporter,
    number: int,
    rounds: int,
    records: Sequence[Mapping[str, Any]],
    stats: Mapping[str, float],
    tokenizer: Any,
) -> None:
    """Report a round that was just sampled, `number` from 1; in some rounds with a sample of its texts."""
    if not report.main:
        return
    report.progress(round_line(number, rounds, records, stats))
    if shows_sample(number, rounds):
        report.say(round_sample(number, rounds, records, tokenizer))


def round_line(number: int, rounds: int, records: Sequence[Mapping[str, Any]], stats: Mapping[str, float]) -> str:
    """Describe round `number` (from 1) in a line: rewards, responses and lengths."""
    count = sum(len(record["responses"]) for record in records)
    return (
        f"round {number}/{rounds}: mean reward {shown(stats['rollout_reward_mean'])} over {count} responses to "
        f"{len(records)} prompts, equal in {stats['rollout_equal_reward_fraction']:.0%} of the groups; "
        f"{stats['rollout_response_length_mean']:.1f} tokens a response, {stats['rollout_unfinished_fraction']:.0%} cut"
    )


def shows_sample(number: int, rounds: int) -> bool:
    """Tell whether texts of round `number` (from 1) are shown: of the first, some between, and the last."""
    return (number - 1) % max(LEAST_PERIOD, -(-rounds // MAX_SAMPLES)) == 0 or number == rounds


def round_sample(number: int, rounds: int, records: Sequence[Mapping[str, Any]], tokenizer: Any) -> str:
    """Show a prompt with its best and its worst response, of the first group with different rewards if there is one."""

    def reward(response: Mapping[str, Any]) -> float:
        return float(response["reward"])

    def spread(record: Mapping[str, Any]) -> bool:
        return not same_rewards([*map(reward, record["responses"])])

    record = next(filter(spread, records), records[0])
    ranked = sorted(record["responses"], key=reward)  # stable, so equal ones are the first and the last
    lines = [f"round {number}/{rounds}, a sample: prompt {quoted(plain_text(tokenizer, record['prompt_ids']))}"]
    for response in (ranked[-1], ranked[0]):
        text = quoted(plain_text(tokenizer, response["response_ids"]))
        lines.append(f"  reward {shown(reward(response))}: {text}")
    return "\n".join(lines)


def quoted(text: str) -> str:
    """Quote a text on one line, its middle left out where it is long; control characters are escaped."""
    if len(text) > HEAD + TAIL:
        text = f"{text[:HEAD]} [... {len(text) - HEAD - TAIL} characters ...] {text[-TAIL:]}"
    return json.dumps(text, ensure_ascii=False)
