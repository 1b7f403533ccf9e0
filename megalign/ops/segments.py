"""Sums of token values by sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(value_T: Tensor, segment_T: Tensor, num_segments: int) -> Tensor:
    """float64 sum of each segment's values: s - s' cancels, and fp32 sums alone would cost 5e-6 of a loss."""
    total_S = value_T.new_zeros(num_segments, dtype=torch.float64)
    return total_S.index_add(0, segment_T, value_T.double())
