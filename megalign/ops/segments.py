"""Sums token values by sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(value_T: Tensor, segment_T: Tensor, num_segments: int) -> Tensor:
    """Return each segment's sum in float64: losses take differences of sums, and fp32 sums would be off by 5e-6."""
    total_S = value_T.new_zeros(num_segments, dtype=torch.float64)
    return total_S.index_add(0, segment_T, value_T.double())
