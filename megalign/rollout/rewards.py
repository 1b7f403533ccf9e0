"""Finds and calls rewards: functions of the prompt's text, the response's text and the prompt's record.

`rollout.reward` is the name of a registered function or `module:function`. The response text has no special tokens.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import sysconfig
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any

from megalign.rollout.answers import equal_answers
from megalign.rollout.guard import CallFailed, call, describe
from megalign.schema import UserError, shorten

RewardFunction = Callable[[str, str, dict[str, Any]], float]

LIMIT_S = 300.0  # for one call, where nobody says otherwise: long enough for a judge that is asked over a network


def call_limit_s(timeout_s: float) -> float:
    """Return the time limit of one reward call: half of the collectives' timeout, in which the other ranks wait."""
    return timeout_s / 2


@dataclass(frozen=True, slots=True)
class Reward:
    """A named reward and the text fields its records must have; dots reach into nested ones (`metadata.source`)."""

    name: str
    function: RewardFunction
    needs: tuple[str, ...] = ()

    def check_record(self, record: Mapping[str, Any], where: str) -> None:
        """Refuse a record that lacks a field this reward reads; before anything was sampled."""
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
                return f"{dotted} is {shorten(value)}; reward {self.name!r} needs a string there"
        return None

    def __call__(
        self, prompt: str, response: str, record: Mapping[str, Any], where: str, *, limit_s: float = LIMIT_S
    ) -> float:
        """Call the function and return a finite float; anything else it does is an error that names record and reward.

        The function gets a copy of the record, so that no call depends on an earlier one's changes.
        """
        try:
            return call(self._number, prompt, response, record, limit_s=limit_s)
        except CallFailed as failed:
            if isinstance(failed.__cause__, UserError):
                raise UserError(f"{where}: {failed.__cause__}") from None
            raise UserError(f"{where}: reward {self.name!r} {failed}; a finite number is needed") from None

    def _number(self, prompt: str, response: str, record: Mapping[str, Any]) -> float:
        """Call the function and convert its result, which may be a number of numpy or torch, to float."""
        value: Any = self.function(prompt, response, deepcopy(dict(record)))
        if inspect.iscoroutine(value):
            value.close()  # else Python warns that nobody awaited it
        try:
            number = value if isinstance(value, (Real, Decimal)) else value.item()
            good = isinstance(number, (Real, Decimal)) and math.isfinite(number)
        except (AttributeError, TypeError, ValueError, RuntimeError, OverflowError):
            good = False
        if not good:
            raise CallFailed(f"returned {shorten(value)}")
        return float(number)


REWARDS: dict[str, Reward] = {}


def reward(name: str, *, needs: tuple[str, ...] = ()) -> Callable[[RewardFunction], RewardFunction]:
    """Register a reward function under `name`."""

    def register(function: RewardFunction) -> RewardFunction:
        REWARDS[name] = Reward(name, function, needs)
        return function

    return register


def choose_reward(spec: str) -> Reward:
    """Return the registered reward of that name, or the function that `module:function` names."""
    if ":" not in spec:
        if spec not in REWARDS:
            raise UserError(f"rollout.reward is {spec!r}; known: {', '.join(sorted(REWARDS))}, or module:function")
        return REWARDS[spec]
    module_name, _, function_name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        lost = isinstance(error, ModuleNotFoundError) and error.name == module_name.split(".")[0]
        looked = f"; looked for in {_module_folders()}; PYTHONPATH adds to these" if lost else ""
        raise UserError(
            f"rollout.reward is {spec!r}: module {module_name!r} cannot be imported: {error}{looked}"
        ) from error
    except (Exception, SystemExit) as error:
        reason = f"module {module_name!r} cannot be imported: it raised {describe(error)}"
        raise UserError(f"rollout.reward is {spec!r}: {reason}") from error
    function = getattr(module, function_name, None)
    if function is None:
        raise UserError(f"rollout.reward is {spec!r}: module {module_name!r} has no {function_name!r}")
    if not callable(function):
        raise UserError(f"rollout.reward is {spec!r}: {function_name!r} is not a function (prompt, response, record)")
    return Reward(spec, function)


def _module_folders() -> str:
    """List the folders of sys.path for an error message, those of Python itself in three words."""
    own = sysconfig.get_path("stdlib"), sys.prefix, sys.base_prefix
    folders = [folder or str(Path.cwd()) for folder in sys.path if not folder.startswith(own)]
    return ", ".join([*dict.fromkeys(folders), "the installed packages"])


@reward("exact_match", needs=("answer",))
def exact_match(prompt: str, response: str, record: dict[str, Any]) -> float:
    """1 where the response is the record's answer, blanks at both ends aside."""
    return float(response.strip() == record["answer"].strip())


@reward("final_number", needs=("answer",))
def final_number(prompt: str, response: str, record: dict[str, Any]) -> float:
    """1 where the response ends in the answer that the record's answer ends in (`\\boxed{42}`, GSM8K's `#### 42`)."""
    return float(equal_answers(response, record["answer"]))


@reward("reasoning_gym", needs=("answer", "metadata.source_dataset"))
def reasoning_gym(prompt: str, response: str, record: dict[str, Any]) -> float:
    """What the record's own reasoning-gym environment scores the response with, blanks at both ends aside."""
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
