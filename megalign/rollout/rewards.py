"""Finds and calls rewards: functions of the prompt's text, the response's text and the prompt's record.

`rollout.reward` is the name of a registered function or `module:function`. The response text has no special tokens. A
function under `@batched` takes a list of `RewardCall` instead and returns a number for each, such as a judge model's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from decimal import Decimal
from numbers import Real
from typing import Any, TypeVar

from megalign.modules import find_function
from megalign.rollout.answers import equal_answers
from megalign.rollout.guard import CallFailed, call
from megalign.schema import UserError, shorten


@dataclass(frozen=True, slots=True)
class RewardCall:
    """Holds a response to reward; `where` names the prompt's record in errors."""

    prompt: str
    response: str
    record: Mapping[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class Batched:
    """Wraps a reward function that takes a list of calls; `batched` makes one."""

    function: Callable[[list[RewardCall]], Sequence[float]]

    def __call__(self, calls: list[RewardCall]) -> Sequence[float]:
        """Return a number for each call."""
        return self.function(calls)


SingleFunction = Callable[[str, str, dict[str, Any]], float]
RewardFunction = SingleFunction | Batched
Function = TypeVar("Function", bound=RewardFunction)

LIMIT_S = 300.0  # of one call where the job sets no limit: long enough for a judge model behind a network


def call_limit_s(timeout_s: float) -> float:
    """Return the time limit of one reward call: half of the time after which the watchdog ends the job."""
    return timeout_s / 2


@dataclass(frozen=True, slots=True)
class Reward:
    """Holds a reward and the text fields its records must have; dots reach into nested ones (`metadata.source`)."""

    name: str
    function: RewardFunction
    needs: tuple[str, ...] = ()

    def check_record(self, record: Mapping[str, Any], where: str) -> None:
        """Refuse a record that lacks a field this reward reads."""
        problem = self.problem(record)
        if problem is not None:
            raise UserError(f"{where}: {problem}")

    def problem(self, record: Mapping[str, Any]) -> str | None:
        """Name the first field that this reward reads and the record lacks, or return None."""
        for dotted in self.needs:
            value: Any = record
            for key in dotted.split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
            if not isinstance(value, str):
                return f"{dotted} is {shorten(value)}; must be a string, which reward {self.name!r} needs there"
        return None

    def __call__(
        self, prompt: str, response: str, record: Mapping[str, Any], where: str, *, limit_s: float = LIMIT_S
    ) -> float:
        """Return one response's reward, as `score` does."""
        return self.score([RewardCall(prompt, response, record, where)], limit_s=limit_s)[0]

    def score(
        self, calls: Sequence[RewardCall], *, limit_s: float = LIMIT_S, beat: Callable[[], None] = lambda: None
    ) -> list[float]:
        """Return the finite reward of each response; anything else is a UserError that names record and reward.

        The function gets copies of the records, so that no call depends on an earlier one's changes. limit_s: for one
        call of the function, which gets all responses at once if it is batched and one otherwise. beat: called before
        each.
        """
        size = max(1, len(calls)) if isinstance(self.function, Batched) else 1
        parts = [calls[first : first + size] for first in range(0, len(calls), size)]
        numbers: list[float] = []
        for part in parts:
            beat()
            numbers += self._score_together(part, limit_s=limit_s)
        return numbers

    def _score_together(self, calls: Sequence[RewardCall], *, limit_s: float) -> list[float]:
        """Call the function once, within its time limit."""
        try:
            return call(self._numbers, calls, limit_s=limit_s)
        except CallFailed as failed:
            index = failed.index if isinstance(failed, _BadNumber) else None
            where = calls[index or 0].where
            if index is None and len(calls) > 1:
                where = f"{where} to {calls[-1].where}"
            if isinstance(failed.__cause__, UserError):
                raise UserError(f"{where}: {failed.__cause__}") from None
            raise UserError(f"{where}: reward {self.name!r} {failed}; must be a finite number") from None

    def _numbers(self, calls: Sequence[RewardCall]) -> list[float]:
        """Call the function and convert its results to float."""
        copies = [replace(each, record=deepcopy(dict(each.record))) for each in calls]
        if not isinstance(self.function, Batched):
            return [_finite(self.function(each.prompt, each.response, dict(each.record)), 0) for each in copies]
        values: Any = self.function(copies)
        try:
            count = -1 if isinstance(values, (str, bytes, Mapping)) else len(values)
        except TypeError:
            count = -1
        if count != len(calls):
            _close(values)
            raise CallFailed(f"returned {shorten(values)} for {len(calls)} responses")
        return [_finite(value, index) for index, value in enumerate(values)]


class _BadNumber(CallFailed):
    """Says what the function returned instead of a reward for the call at `index`."""

    def __init__(self, text: str, index: int) -> None:
        super().__init__(text)
        self.index = index


def _finite(value: Any, index: int) -> float:
    """Convert a result, which may be a number of numpy or torch, to float."""
    _close(value)
    try:
        number = value if isinstance(value, (Real, Decimal)) else value.item()
        good = isinstance(number, (Real, Decimal)) and math.isfinite(number)
    except (AttributeError, TypeError, ValueError, RuntimeError, OverflowError):
        good = False
    if not good:
        raise _BadNumber(f"returned {shorten(value)}", index)
    return float(number)


def _close(value: Any) -> None:
    """Close a coroutine; else Python warns that nobody awaited it."""
    if inspect.iscoroutine(value):
        value.close()


def batched(function: Callable[[list[RewardCall]], Sequence[float]]) -> Batched:
    """Mark a reward function as one that takes a list of `RewardCall` and returns a number for each."""
    return Batched(function)


REWARDS: dict[str, Reward] = {}


def reward(name: str, *, needs: tuple[str, ...] = ()) -> Callable[[Function], Function]:
    """Register a reward function under `name`."""

    def register(function: Function) -> Function:
        REWARDS[name] = Reward(name, function, needs)
        return function

    return register


def choose_reward(spec: str) -> Reward:
    """Return the registered reward of that name, or the function that `module:function` names."""
    if ":" not in spec:
        if spec not in REWARDS:
            raise UserError(f"rollout.reward is {spec!r}; must be {', '.join(sorted(REWARDS))} or module:function")
        return REWARDS[spec]
    return Reward(spec, find_function("rollout.reward", spec, signature="(prompt, response, record)"))


@reward("exact_match", needs=("answer",))
def exact_match(prompt: str, response: str, record: dict[str, Any]) -> float:
    """Return 1 if the response equals the record's answer, apart from surrounding whitespace, else 0."""
    return float(response.strip() == record["answer"].strip())


@reward("final_number", needs=("answer",))
def final_number(prompt: str, response: str, record: dict[str, Any]) -> float:
    """Return 1 if the response's final answer equals the record's (`\\boxed{42}`, GSM8K's `#### 42`), else 0."""
    return float(equal_answers(response, record["answer"]))


@reward("reasoning_gym", needs=("answer", "metadata.source_dataset"))
def reasoning_gym(prompt: str, response: str, record: dict[str, Any]) -> float:
    """Return the score of the stripped response by the record's own reasoning-gym environment."""
    try:
        from reasoning_gym import get_score_answer_fn
    except ImportError as error:
        raise UserError(
            "rollout.reward is 'reasoning_gym': the package is missing; pip install reasoning-gym"
        ) from error
    name = record["metadata"]["source_dataset"]
    try:
        score = get_score_answer_fn(name)
    except ValueError as error:
        raise UserError(f"metadata.source_dataset is {name!r}: reasoning-gym knows no such environment") from error
    return score(response.strip(), record)
