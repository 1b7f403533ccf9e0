"""The learning rate of a step, by hand."""

from __future__ import annotations

import pytest

from megalign.config.sections import OptimizerSection
from megalign.train.schedule import learning_rate


def rates(num_steps: int, **schedule: object) -> list[float]:
    cfg = OptimizerSection.model_validate({"lr": 1.0, "schedule": schedule})
    return [learning_rate(cfg, step, num_steps) for step in range(1, num_steps + 1)]


CASES = [
    (3, {}, [1, 1, 1]),
    (5, {"warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1]),
    # Four steps after two of warm-up: down by a quarter of 1 - 0.2 each.
    (6, {"name": "linear", "warmup_steps": 2, "min_lr": 0.2}, [0.5, 1, 0.8, 0.6, 0.4, 0.2]),
    (4, {"name": "linear"}, [0.75, 0.5, 0.25, 0]),
    # (1 + cos(pi n / 4)) / 2 for n = 1..4.
    (4, {"name": "cosine"}, [0.8535533905932737, 0.5, 0.14644660940672627, 0]),
    (4, {"name": "cosine", "warmup_steps": 2, "min_lr": 0.5}, [0.5, 1, 0.75, 0.5]),
    (1, {"name": "cosine", "min_lr": 0.1}, [0.1]),
    (2, {"name": "linear", "warmup_steps": 4, "min_lr": 0.1}, [0.25, 0.5]),  # ends before the warm-up does
]


@pytest.mark.parametrize(("num_steps", "schedule", "expected"), CASES)
def test_rates_by_hand(num_steps, schedule, expected):
    assert rates(num_steps, **schedule) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("num_steps", [2, 7, 1000])
def test_last_step_is_min_lr_to_the_bit(name, num_steps):
    assert rates(num_steps, name=name, min_lr=3e-7)[-1] == 3e-7


def test_no_rate_is_above_lr():
    assert max(rates(50, name="cosine", warmup_steps=7)) == 1
