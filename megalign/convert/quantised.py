"""Weights stored in few bits beside their scales, and what they are: FP8 in blocks (DeepSeek-V3), MXFP4 (gpt-oss)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalign.convert.config_file import ConfigFile, read_json
from megalign.schema import UserError

FP8 = torch.float8_e4m3fn
SCALE = "_scale_inv"  # after the name of a weight in FP8
BLOCKS, SCALES = "_blocks", "_scales"  # after the name of what they are instead of
# The numbers of four bits: a sign, two of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3).
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
Describe = Callable[[str], tuple[tuple[int, ...], Any]]  # a stored tensor's shape and dtype
Read = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A matrix in FP8 whose blocks of rows x columns have a scale each (DeepSeek-V3, section 3.3.2)."""

    path: Path  # of the scales
    name: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    dtype: torch.dtype  # what it becomes

    @property
    def stored_as(self) -> tuple[str, ...]:
        return (self.name, self.name + SCALE)

    def tensor(self, read: Read) -> Tensor:
        """Weights times their scales, rounded once; UserError where a scale is not a number > 0."""
        weight, scale = read(self.name), read(self.name + SCALE).float()
        bad = ~(torch.isfinite(scale) & (scale > 0))
        if bad.any():
            place = bad.nonzero()[0].tolist()
            found = f"tensor {self.name}{SCALE} is {float(scale[tuple(place)])} at {place}"
            raise UserError(f"{self.path}: {found}; needed: finite numbers > 0")
        (rows, columns), (height, width) = weight.shape, self.block
        out = torch.empty(weight.shape, dtype=self.dtype)
        for band in range(scale.shape[0]):  # a row of blocks at a time, so that fp32 copies stay small
            part = slice(band * height, min((band + 1) * height, rows))
            factor = scale[band].repeat_interleave(width)[:columns]
            out[part] = (weight[part].float() * factor).to(out.dtype)
        return out


@dataclass(frozen=True, slots=True)
class Mxfp4Experts:
    """Matrices of all experts, each row in blocks of 32 numbers of four bits that share a power of two.

    Stored: [experts, rows, blocks, 16] bytes of two numbers, the lower half first, and [experts, rows, blocks]
    exponents with 127 added (OCP Microscaling Formats 1.0). What they stand for is [experts, columns, rows].
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stored_as(self) -> tuple[str, ...]:
        return (self.name + BLOCKS, self.name + SCALES)

    def tensor(self, read: Read) -> Tensor:
        """All experts'."""
        out = torch.empty(self.shape, dtype=self.dtype)
        for number in range(self.shape[0]):
            out[number] = self.expert(number, read)
        return out

    def expert(self, number: int, read: Read) -> Tensor:
        """One expert's [columns, rows], a view; UserError where a scale is not a number."""
        blocks, scale = read(self.name + BLOCKS)[number], read(self.name + SCALES)[number]
        if (scale == 255).any():
            place = [number, *(scale == 255).nonzero()[0].tolist()]
            raise UserError(
                f"{self.path}: tensor {self.name}{SCALES} is 255 (not a number) at {place}; needed: 0 to 254"
            )
        pairs = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).int()
        values = torch.ldexp(torch.tensor(FP4)[pairs], scale[..., None].int() - 127)
        return values.flatten(-2).to(self.dtype).transpose(0, 1)


Quantised = Fp8Weight | Mxfp4Experts


def quantisation(folder: Path) -> ConfigFile | None:
    """config.json's words on how weights are quantised, where it has any; UserError for a way that is not read."""
    path = folder / "config.json"
    settings = read_json(path).get("quantization_config")
    if settings is None:
        return None
    fields = settings if isinstance(settings, dict) else {"quant_method": settings}
    config = ConfigFile(path, fields, {}, "quantization_config.")
    method = config.value("quant_method")
    if method not in ("fp8", "mxfp4"):
        config.refuse("quant_method", "allowed: fp8, mxfp4; of other quantised checkpoints use the bfloat16 one")
    size = config.value("weight_block_size")
    good = isinstance(size, list) and len(size) == 2 and all(type(one) is int and one > 0 for one in size)
    if method == "fp8" and not good:
        config.refuse("weight_block_size", "needed: rows and columns that share one scale, such as [128, 128]")
    return config


def find_quantised(folder: Path, files: Mapping[str, Path], describe: Describe) -> dict[str, Quantised]:
    """What is quantised, by the name of the weight; UserError where scales are missing or of another shape."""
    config = quantisation(folder)
    if config is None:
        return {}
    dtype, found = _config_dtype(folder), {}
    for name, path in files.items():
        one: Quantised
        if config.value("quant_method") == "fp8" and describe(name)[1] == FP8:
            shape, block = describe(name)[0], tuple(config.value("weight_block_size"))
            if len(shape) != 2:
                raise UserError(f"{path}: tensor {name} in F8_E4M3 has shape {list(shape)}; needed: a matrix")
            needed = tuple(-(-size // part) for size, part in zip(shape, block))
            one = Fp8Weight(files.get(name + SCALE, path), name, shape, (block[0], block[1]), dtype)
            _check_scale(folder, files, describe, name + SCALE, needed, f"{name} is stored as F8_E4M3")
        elif config.value("quant_method") == "mxfp4" and name.endswith(BLOCKS):
            name, (shape, stored) = name.removesuffix(BLOCKS), describe(name)
            if len(shape) != 4 or shape[3] != 16 or stored != torch.uint8:
                what = f"has shape {list(shape)}; needed: bytes [experts, rows, blocks, 16]"
                raise UserError(f"{path}: tensor {name}{BLOCKS} {what}")
            one = Mxfp4Experts(files.get(name + SCALES, path), name, (shape[0], shape[2] * 32, shape[1]), dtype)
            _check_scale(folder, files, describe, name + SCALES, shape[:3], f"{name}{BLOCKS} is stored as MXFP4")
        else:
            continue
        found[name] = one
    return found


def _check_scale(
    folder: Path, files: Mapping[str, Path], describe: Describe, scale: str, needed: tuple[int, ...], reason: str
) -> None:
    if scale not in files:
        raise UserError(f"{folder}: tensor {scale} is missing; {reason} and needs it")
    found, _ = describe(scale)
    if found != needed:
        raise UserError(f"{files[scale]}: tensor {scale} has shape {list(found)}; needed: {list(needed)}")


def _config_dtype(folder: Path) -> torch.dtype:
    """What quantised weights become."""
    config = read_json(folder / "config.json")
    name = config.get("dtype", config.get("torch_dtype")) or "bfloat16"
    dtype = getattr(torch, str(name), None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UserError(f"{folder / 'config.json'}: dtype is {name!r}; allowed: bfloat16, float16, float32")
    assert isinstance(dtype, torch.dtype)
    return dtype
