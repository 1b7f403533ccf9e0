"""Computes rotary position embeddings: frequencies, and the rotation of queries and keys.

Axes: L token positions, N heads, D head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalign.model_config import LinearScaling, Llama3Scaling, LongScaling, Rope, YarnScaling


def frequencies(rope: Rope, *, long: bool = False) -> Tensor:
    """Return inverse frequencies [dim / 2] in fp32; long: for sequences beyond LongRoPE's original length."""
    exponent = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    plain, scaling = 1.0 / (rope.theta**exponent), rope.scaling
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return _llama3(plain, scaling)
    if isinstance(scaling, YarnScaling):
        return _yarn(plain, rope, scaling)
    if isinstance(scaling, LongScaling):
        return 1.0 / (torch.tensor(scaling.long if long else scaling.short) * rope.theta**exponent)
    return plain


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    wavelength = 2 * math.pi / plain
    low = scaling.original_max_positions / scaling.low_freq_factor
    high = scaling.original_max_positions / scaling.high_freq_factor
    smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * plain / scaling.factor + smooth * plain
    scaled = torch.where(wavelength > low, plain / scaling.factor, plain)
    return torch.where((wavelength <= low) & (wavelength >= high), blended, scaled)


def _yarn(plain: Tensor, rope: Rope, scaling: YarnScaling) -> Tensor:
    """Scale frequencies as YaRN does (equation 20).

    A dimension's frequency is divided where it makes fewer than `beta_slow` rotations over the original length, kept
    where it makes more than `beta_fast`, and blended between.
    """

    def dimension(rotations: float) -> float:
        inside = math.log(scaling.original_max_positions / (rotations * 2 * math.pi))
        return rope.dim * inside / (2 * math.log(rope.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


class Rotary:
    """Computes cosines and sines of positions for each kind of rotary positions that a model has."""

    def __init__(self, ropes: tuple[Rope, ...]) -> None:
        self.ropes = ropes
        self.short = [frequencies(rope) for rope in ropes]
        self.long = [frequencies(rope, long=True) for rope in ropes]

    def _move(self, device: torch.device) -> None:
        """Have the frequencies on a device from now on."""
        if self.short[0].device != device:
            self.short, self.long = ([each.to(device) for each in table] for table in (self.short, self.long))

    def __call__(self, position_L: Tensor, length_L: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [kinds, 2 (cosine, sine), L, dim / 2] in `dtype`; length_L: each position's sequence length."""
        tables = []
        self._move(position_L.device)
        for rope, frequency, long in zip(self.ropes, self.short, self.long, strict=True):
            factor = 1.0
            if isinstance(rope.scaling, LongScaling):
                outgrown_L1 = (length_L > rope.scaling.original_max_positions)[:, None]
                frequency = torch.where(outgrown_L1, long, frequency)
            if isinstance(rope.scaling, YarnScaling | LongScaling):
                factor = rope.scaling.attention_factor
            angle = position_L.float()[:, None] * frequency
            tables.append(torch.stack((angle.cos() * factor, angle.sin() * factor)))
        return torch.stack(tables).to(dtype)

    def angles(self, longest: int, device: torch.device) -> Tensor:
        """Return angles [longest, 1, 1, dim] of the first kind, the form that TransformerEngine's layers take."""
        self._move(device)
        angle = torch.arange(longest, dtype=torch.float32, device=device)[:, None] * self.short[0]
        return torch.cat((angle, angle), dim=-1)[:, None, None, :]


def rotate(x_LND: Tensor, cos_sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate the first `dim` dimensions of every head by cos_sin [2, L, dim / 2], in the more precise dtype."""
    cos, sin = cos_sin[:, :, None]
    dim = 2 * cos.shape[-1]
    rotary, plain = x_LND[..., :dim], x_LND[..., dim:]
    if interleaved:
        a, b = rotary[..., 0::2], rotary[..., 1::2]
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = rotary.chunk(2, dim=-1)
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    rotated = rotated.to(x_LND.dtype)
    return rotated if not plain.shape[-1] else torch.cat((rotated, plain), dim=-1)
