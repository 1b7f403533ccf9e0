"""Compares values with answers, and the metrics of one run with another's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

# `clip_fraction`: what is clipped depends on the sign of advantages, some of which are zero but for rounding.
BY_LAYOUT = {"padding_fraction", "pass_mode", "pass_gap", "clip_fraction"}
# Tiny models' log-probs are below 8, where fp32 values are 2**-21 apart; twenty roundings, because batches of other
# shapes are summed in another order.
LOGP_ROUNDING = 20 * 2**-21


def relative(value: Any, answer: Any) -> float:
    """Return the distance relative to the answer's size, of numbers, vectors and tensors alike."""
    value, answer = (torch.as_tensor(one, dtype=torch.float64) for one in (value, answer))
    return float((value - answer).norm() / answer.norm())


def assert_same_steps(result: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    """Assert that two runs of optimizer steps have the same losses, gradient norms and final weights."""
    for (value, norm), (right_value, right_norm) in zip(result["steps"], answer["steps"], strict=True):
        assert relative(value, right_value) < 1e-5
        assert relative(norm, right_norm) < 1e-4
    assert result["weights"].keys() == answer["weights"].keys()
    for name, weight in answer["weights"].items():
        assert relative(result["weights"][name], weight) < 1e-5, name


def distances(found: Mapping[str, Tensor], answer: Mapping[str, Tensor]) -> dict[str, float]:
    """Return each tensor's distance from the right one, relative to the larger of its size and a thousandth of all."""
    assert found.keys() == answer.keys() and found
    whole = torch.cat([one.flatten() for one in answer.values()]).norm()
    return {
        name: float((found[name].double() - right).norm() / max(right.norm(), 1e-3 * whole))
        for name, right in answer.items()
    }


def assert_close_metrics(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Assert that two runs of one job in two layouts have the same metrics, up to rounding in fp32."""
    assert len(found) == len(wanted) > 0
    for line, other in zip(found, wanted, strict=True):
        assert line.keys() == other.keys()
        for key in line.keys() - BY_LAYOUT:
            # What is measured on s - s' alone loses the digits that the two share.
            digits = {"loss": 1e-5, "grad_norm": 1e-4, "reward_mean": 1e-12}.get(key, 1e-3)
            # Advantages sum to zero, so a loss of theirs is what is left of terms of tens: a millionth of these.
            close = pytest.approx(other[key], rel=digits, abs=1e-5 if key == "loss" else 2e-6)
            assert line[key] == close, f"step {other['step']} {key}"
