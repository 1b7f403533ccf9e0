"""Attention one slot, head and position at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def slow_attention(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], window: int | None) -> Tensor:
    """Compute causal attention over packed slots, a head and position at a time, in a sliding `window` where given."""
    out = torch.empty_like(query)
    repeats = query.shape[1] // key.shape[1]
    first = 0
    for length in lengths:
        for place in range(first, first + length):
            start = first if window is None else max(first, place - window + 1)
            for head in range(query.shape[1]):
                seen = slice(start, place + 1)
                scores = key[seen, head // repeats] @ query[place, head] / query.shape[2] ** 0.5
                out[place, head] = scores.softmax(dim=0) @ value[seen, head // repeats]
        first += length
    return out.flatten(1)
