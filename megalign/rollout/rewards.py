"""Verifiable rewards: a function of prompt text, response text and the prompt's record.

`rollout.reward` is the name of a registered function or `module:function`. The response text has no special tokens.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any

from megalign.schema import UserError

RewardFunction = Callable[[str, str, dict[str, Any]], float]

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Reward:
    """A named reward and the fields its records must have, dots going inside."""

    name: str
    function: RewardFunction
    needs: tuple[str, ...] = ()

    def check_record(self, record: Mapping[str, Any], where: str) -> None:
        """Refuse a record that lacks a field this reward reads; before anything was sampled."""
        for dotted in self.needs:
            value: Any = record
            for key in dotted.split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
            if not isinstance(value, str):
                raise UserError(f"{where}: {dotted} is {value!r}; reward {self.name!r} needs a string there")

    def __call__(self, prompt: str, response: str, record: Mapping[str, Any], where: str) -> float:
        """The reward as a finite float; anything else is an error that names the record."""
        try:
            value = self.function(prompt, response, dict(record))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if not isinstance(value, Real) or not math.isfinite(value):
            raise UserError(f"{where}: reward {self.name!r} returned {value!r}; a finite number is needed")
        return float(value)


REWARDS: dict[str, Reward] = {}


def reward(name: str, *, needs: tuple[str, ...] = ()) -> Callable[[RewardFunction], RewardFunction]:
    """Register a reward function under `name`."""

    def register(function: RewardFunction) -> RewardFunction:
        REWARDS[name] = Reward(name, function, needs)
        return function

    return register


def choose_reward(spec: str) -> Reward:
    """The registered reward of that name, or the function that `module:function` names."""
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
    function = getattr(module, function_name, None)
    if function is None:
        raise UserError(f"rollout.reward is {spec!r}: module {module_name!r} has no {function_name!r}")
    if not callable(function):
        raise UserError(f"rollout.reward is {spec!r}: {function_name!r} is not a function (prompt, response, record)")
    return Reward(spec, function)


def _module_folders() -> str:
    """The folders that modules are imported from, as an error shows them; Python's own are one word."""
    own = sysconfig.get_path("stdlib"), sys.prefix, sys.base_prefix
    folders = [folder or str(Path.cwd()) for folder in sys.path if not folder.startswith(own)]
    return ", ".join([*dict.fromkeys(folders), "the installed packages"])


@reward("exact_match", needs=("answer",))
def exact_match(prompt: str, response: str, record: dict[str, Any]) -> float:
    """1 where the response is the record's answer, blanks at both ends aside."""
    return float(response.strip() == record["answer"].strip())


@reward("final_number", needs=("answer",))
def final_number(prompt: str, response: str, record: dict[str, Any]) -> float:
    """1 where the last number of the response equals the last number of the answer (GSM8K's `#### 42`)."""
    found, wanted = NUMBER.findall(response), NUMBER.findall(record["answer"])
    if not found or not wanted:
        return 0.0
    return float(Decimal(found[-1].replace(",", "")) == Decimal(wanted[-1].replace(",", "")))


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
