"""Computes probability ratios between two policies and the clipped objective built on them, for any shape."""

from __future__ import annotations

import torch
from torch import Tensor

# exp(30) = 1e13: far beyond any ratio worth learning from, and its square still fits an fp32 gradient norm.
LARGEST_LOG_RATIO = 30.0


def bounded_exp(value: Tensor) -> Tensor:
    """Return exp(value), continued by its tangent above the largest log-ratio: value and gradient stay finite."""
    low = value.clamp(max=LARGEST_LOG_RATIO)
    return low.exp() * (1 + (value - low))


def clipped_loss(log_ratio: Tensor, advantage: Tensor, *, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return (-min(rho A, clip(rho, 1 - low, 1 + high) A), bool: where clipping makes the gradient zero)."""
    ratio = bounded_exp(log_ratio)
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    too_low = (ratio < 1 - low) & (advantage < 0)
    too_high = (ratio > 1 + high) & (advantage > 0)
    return loss, (too_low | too_high).detach()
