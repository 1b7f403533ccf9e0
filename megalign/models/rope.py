"""Rotary positions: their frequencies, and the turning. Axes: L token positions, N heads, D head dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalign.convert.model_config import LinearScaling, Llama3Scaling, LongScaling, Rope, YarnScaling


def frequencies(rope: Rope, *, long: bool = False) -> Tensor:
    """Inverse frequencies [dim / 2] fp32; long: those of a sequence beyond LongRoPE's first training."""
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
    """Divided where a dimension turns less than `beta_slow` times over the first training's length, kept where it
    turns more than `beta_fast` times (YaRN, equation 20)."""

    def dimension(turns: float) -> float:
        inside = math.log(scaling.original_max_positions / (turns * 2 * math.pi))
        return rope.dim * inside / (2 * math.log(rope.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


class Rotary:
    """Cosines and sines of a model's positions, for each of its kinds of rotary positions."""

    def __init__(self, ropes: tuple[Rope, ...]) -> None:
        self.ropes = ropes
        self.short = [frequencies(rope) for rope in ropes]
        self.long = [frequencies(rope, long=True) for rope in ropes]

    def __call__(self, position_L: Tensor, length_L: Tensor, dtype: torch.dtype) -> Tensor:
        """[kinds, 2 (cosine, sine), L, dim / 2] in `dtype`; length_L: tokens of the sequence that a position is of."""
        tables = []
        for rope, short, long in zip(self.ropes, self.short, self.long, strict=True):
            frequency = short.to(position_L.device)
            factor = 1.0
            if isinstance(rope.scaling, LongScaling):
                outgrown_L1 = (length_L > rope.scaling.original_max_positions)[:, None]
                frequency = torch.where(outgrown_L1, long.to(position_L.device), frequency)
            if isinstance(rope.scaling, YarnScaling | LongScaling):
                factor = rope.scaling.attention_factor
            angle = position_L.float()[:, None] * frequency
            tables.append(torch.stack((angle.cos() * factor, angle.sin() * factor)))
        return torch.stack(tables).to(dtype)

    def angles(self, position_T: Tensor) -> Tensor:
        """[T, 1, 1, dim] of the first kind, as TransformerEngine's layers take them."""
        angle = position_T.float()[:, None] * self.short[0].to(position_T.device)
        return torch.cat((angle, angle), dim=-1)[:, None, None, :]


def turn(x_LND: Tensor, cos_sin: Tensor, *, interleaved: bool) -> Tensor:
    """Turn the first 2 * (last of cos_sin [2, L, dim / 2]) dimensions of every head, in the wider of both dtypes."""
    cos, sin = cos_sin[:, :, None]
    dim = 2 * cos.shape[-1]
    turning, still = x_LND[..., :dim], x_LND[..., dim:]
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turning.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    turned = turned.to(x_LND.dtype)
    return turned if not still.shape[-1] else torch.cat((turned, still), dim=-1)
