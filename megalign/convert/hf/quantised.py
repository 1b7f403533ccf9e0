"""Dequantises weights that are stored with scales: block-wise FP8 (DeepSeek-V3) and MXFP4 (gpt-oss)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalign.convert.hf.config_json import ConfigFile, read_json
from megalign.schema import UserError

FP8 = torch.float8_e4m3fn
SCALE = "_scale_inv"  # suffix of the scales of an FP8 weight
BLOCKS, SCALES = "_blocks", "_scales"  # suffixes of the two tensors stored for an MXFP4 weight
# Values of FP4 (E2M1: sign, 2 exponent bits, 1 mantissa bit; OCP Microscaling Formats 1.0, section 5.3.3).
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
Describe = Callable[[str], tuple[tuple[int, ...], Any]]  # stored tensor's name -> (shape, dtype)
Read = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """Describes an FP8 matrix with one scale per block of rows x columns (DeepSeek-V3, section 3.3.2)."""

    path: Path  # of the scales
    name: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    dtype: torch.dtype  # after dequantisation

    @property
    def stored_as(self) -> tuple[str, ...]:
        """Return the names of the stored tensors."""
        return (self.name, self.name + SCALE)

    def tensor(self, read: Read) -> Tensor:
        """Dequantise the matrix, rounding once; UserError where a scale is not a finite number > 0."""
        weight, scale = read(self.name), read(self.name + SCALE).float()
        bad = ~(torch.isfinite(scale) & (scale > 0))
        if bad.any():
            index = bad.nonzero()[0].tolist()
            problem = f"tensor {self.name}{SCALE} is {float(scale[tuple(index)])} at {index}"
            raise UserError(f"{self.path}: {problem}; must be finite numbers > 0")
        (rows, columns), (height, width) = weight.shape, self.block
        out = torch.empty(weight.shape, dtype=self.dtype)
        for band in range(scale.shape[0]):  # one row of blocks at a time, which keeps fp32 copies small
            part = slice(band * height, min((band + 1) * height, rows))
            factor = scale[band].repeat_interleave(width)[:columns]
            out[part] = (weight[part].float() * factor).to(out.dtype)
        return out


@dataclass(frozen=True, slots=True)
class Mxfp4Experts:
    """Describes the stacked matrices of all experts in MXFP4: blocks of 32 FP4 values with one power-of-two scale.

    Stored: [experts, rows, blocks, 16] bytes of two values each, the low four bits first, and [experts, rows, blocks]
    scale exponents with a bias of 127 (OCP Microscaling Formats 1.0). The weight has shape [experts, columns, rows].
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stored_as(self) -> tuple[str, ...]:
        """Return the names of the stored tensors."""
        return (self.name + BLOCKS, self.name + SCALES)

    def tensor(self, read: Read) -> Tensor:
        """Dequantise the matrices of all experts."""
        out = torch.empty(self.shape, dtype=self.dtype)
        for number in range(self.shape[0]):
            out[number] = self.expert(number, read)
        return out

    def expert(self, number: int, read: Read) -> Tensor:
        """Dequantise one expert's matrix, a view [columns, rows]; UserError where a scale is NaN."""
        blocks, scale = read(self.name + BLOCKS)[number], read(self.name + SCALES)[number]
        if (scale == 255).any():
            index = [number, *(scale == 255).nonzero()[0].tolist()]
            raise UserError(
                f"{self.path}: tensor {self.name}{SCALES} is 255 (not a number) at {index}; must be 0 to 254"
            )
        pairs = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).int()
        values = torch.ldexp(torch.tensor(FP4)[pairs], scale[..., None].int() - 127)
        return values.flatten(-2).to(self.dtype).transpose(0, 1)


Quantised = Fp8Weight | Mxfp4Experts


def quantisation(path: Path, hf: Mapping[str, Any]) -> ConfigFile | None:
    """Return `quantization_config` of the config.json at `path`, if any; UserError for a method that is not read."""
    settings = hf.get("quantization_config")
    if settings is None:
        return None
    fields = settings if isinstance(settings, dict) else {"quant_method": settings}
    section = ConfigFile(path, fields, {}, "quantization_config.")
    method = section.value("quant_method")
    if method not in ("fp8", "mxfp4"):
        section.refuse("quant_method", "must be fp8 or mxfp4; of other quantised checkpoints use the bfloat16 one")
    size = section.value("weight_block_size")
    good = isinstance(size, list) and len(size) == 2 and all(type(length) is int and length > 0 for length in size)
    if method == "fp8" and not good:
        section.refuse("weight_block_size", "must be rows and columns that share one scale, such as [128, 128]")
    return section


def find_quantised(folder: Path, files: Mapping[str, Path], describe: Describe) -> dict[str, Quantised]:
    """Return {name: weight} of the quantised weights; UserError where scales are missing or of a wrong shape."""
    config_path = folder / "config.json"
    hf = read_json(config_path)
    section = quantisation(config_path, hf)
    if section is None:
        return {}
    dtype, weights = _config_dtype(config_path, hf), {}
    for name, path in files.items():
        weight: Quantised
        if section.value("quant_method") == "fp8" and describe(name)[1] == FP8:
            shape, block = describe(name)[0], tuple(section.value("weight_block_size"))
            if len(shape) != 2:
                raise UserError(f"{path}: tensor {name} in F8_E4M3 has shape {list(shape)}; must be a matrix")
            needed = tuple(-(-size // part) for size, part in zip(shape, block))
            weight = Fp8Weight(files.get(name + SCALE, path), name, shape, (block[0], block[1]), dtype)
            _check_scale(folder, files, describe, name + SCALE, needed, f"{name} is stored as F8_E4M3")
        elif section.value("quant_method") == "mxfp4" and name.endswith(BLOCKS):
            name, (shape, stored) = name.removesuffix(BLOCKS), describe(name)
            if len(shape) != 4 or shape[3] != 16 or stored != torch.uint8:
                what = f"has shape {list(shape)}; must be bytes [experts, rows, blocks, 16]"
                raise UserError(f"{path}: tensor {name}{BLOCKS} {what}")
            weight = Mxfp4Experts(files.get(name + SCALES, path), name, (shape[0], shape[2] * 32, shape[1]), dtype)
            _check_scale(folder, files, describe, name + SCALES, shape[:3], f"{name}{BLOCKS} is stored as MXFP4")
        else:
            continue
        weights[name] = weight
    return weights


def _check_scale(
    folder: Path, files: Mapping[str, Path], describe: Describe, scale: str, needed: tuple[int, ...], reason: str
) -> None:
    """Raise UserError unless the tensor `scale` is stored, in the shape `needed`."""
    if scale not in files:
        raise UserError(f"{folder}: tensor {scale} is missing; {reason} and needs it")
    shape, _ = describe(scale)
    if shape != needed:
        raise UserError(f"{files[scale]}: tensor {scale} has shape {list(shape)}; must be {list(needed)}")


def _config_dtype(path: Path, hf: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype in config.json, which weights are dequantised to."""
    name = hf.get("dtype", hf.get("torch_dtype")) or "bfloat16"
    dtype = getattr(torch, str(name), None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UserError(f"{path}: dtype is {name!r}; must be bfloat16, float16 or float32")
    assert isinstance(dtype, torch.dtype)
    return dtype
