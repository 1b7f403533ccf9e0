"""Draws the first values of LoRA adapters, the same under every engine and layout."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def initial_a(rank: int, columns: int, seed: str) -> Tensor:
    """Draw A [rank, columns] as PEFT initialises it: Kaiming uniform with a = sqrt(5)."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little") >> 1
    draw = torch.Generator().manual_seed(number)
    return (torch.rand(rank, columns, generator=draw) * 2 - 1) / math.sqrt(columns)
