"""The weight files of a Hugging Face checkpoint as they lie on the disk: safetensors, or pickles where wanted."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalign.convert.config_file import ConfigFile, read_json
from megalign.convert.safetensors_file import DTYPES
from megalign.schema import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FP8 = (torch.float8_e4m3fn,)
SCALE = "_scale_inv"


class StoredFiles:
    """Tensors by name in the files of a folder, mapped into memory.

    blocks: rows and columns that share one scale in weights of FP8 (DeepSeek-V3's form), None where there are none.
    """

    def __init__(self, folder: Path, *, allow_pickle: bool = False) -> None:
        self.folder = folder
        self.handles: dict[Path, Any] = {}
        self.files: dict[str, Path] = {}
        self.blocks = fp8_blocks(folder)
        self.dequantised_dtype = _config_dtype(folder) if self.blocks is not None else torch.bfloat16
        paths, weight_map, index = self.find(folder, allow_pickle=allow_pickle)
        for path in paths:
            for name in self._open(path, index).keys():  # noqa: SIM118  (not always a mapping)
                if name in self.files:
                    raise UserError(
                        f"{path}: tensor {name} is also in {self.files[name].name}; each must be there once"
                    )
                self.files[name] = path
        for name, file in weight_map.items():
            if self.files.get(name) != folder / file:
                raise UserError(f"{folder / index}: weight_map.{name} is {file!r}; that file does not hold the tensor")

    @staticmethod
    def find(folder: Path, *, allow_pickle: bool) -> tuple[list[Path], Mapping[str, str], str]:
        """(files, what the index says of them, the index's name); one unsharded file wins, as in transformers."""
        choices = [(SINGLE, INDEX)] + ([(PICKLE, PICKLE_INDEX)] if allow_pickle else [])
        for single, index in choices:
            if (folder / single).is_file():
                return [folder / single], {}, index
            if (folder / index).is_file():
                weight_map = _weight_map(folder / index)
                return [folder / file for file in sorted(set(weight_map.values()))], weight_map, index
        pickled = (folder / PICKLE).is_file() or (folder / PICKLE_INDEX).is_file()
        hint = "; tools/hf_to_megatron.py reads its pickles with --allow-pickle" if pickled and not allow_pickle else ""
        raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}; only safetensors are read, never pickles{hint}")

    def describe(self, name: str) -> tuple[tuple[int, ...], Any]:
        """(shape, dtype) from the header; the format's own name where torch has no such dtype."""
        handle = self._open(self.files[name], INDEX)
        if isinstance(handle, dict):
            return tuple(handle[name].shape), handle[name].dtype
        header = handle.get_slice(name)
        return tuple(header.get_shape()), DTYPES.get(header.get_dtype(), header.get_dtype())

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file."""
        handle = self._open(self.files[name], INDEX)
        found: Tensor = handle[name] if isinstance(handle, dict) else handle.get_tensor(name)
        return found

    def is_scale(self, name: str, needed: Mapping[str, Any]) -> bool:
        """Whether a tensor holds the scales of a weight that the model needs."""
        return self.blocks is not None and name.endswith(SCALE) and name.removesuffix(SCALE) in needed

    def _open(self, path: Path, index: str) -> Any:
        if path not in self.handles:
            self.handles[path] = _unpickled(path) if path.suffix == ".bin" else _opened(path, index)
        return self.handles[path]

    def close(self) -> None:
        """Let go of the files."""
        self.handles.clear()


def _opened(path: Path, index: str) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {index} names it") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a complete safetensors file: {error}") from None


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Plain tensors only: torch refuses a pickle that names anything else."""
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # of before torch 1.6, which cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {PICKLE_INDEX} names it") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a pickle of plain tensors: {' '.join(str(error).split())[:150]}") from None
    if not isinstance(found, dict) or not all(isinstance(one, Tensor) for one in found.values()):
        raise UserError(f"{path} is not a pickle of plain tensors; needed: a dictionary of them by name")
    return found


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: weight_map is {weight_map!r}; needed: tensor names and their files")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{path}: weight_map.{tensor} is {file!r}; needed: a file beside the index")
    return weight_map


def fp8_blocks(folder: Path) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where config.json says that weights are in blocks of FP8."""
    path = folder / "config.json"
    settings = read_json(path).get("quantization_config")
    if settings is None:
        return None
    config = ConfigFile(
        path, settings if isinstance(settings, dict) else {"quant_method": settings}, {}, "quantization_config."
    )
    if config.value("quant_method") != "fp8":
        config.refuse("quant_method", "allowed: fp8; of other quantised checkpoints use the bfloat16 one")
    size = config.value("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(one) is int and one > 0 for one in size):
        config.refuse("weight_block_size", "needed: rows and columns that share one scale, such as [128, 128]")
    return size[0], size[1]


def _config_dtype(folder: Path) -> torch.dtype:
    """What weights become that are stored in FP8."""
    config = read_json(folder / "config.json")
    name = config.get("dtype", config.get("torch_dtype")) or "bfloat16"
    dtype = getattr(torch, str(name), None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UserError(f"{folder / 'config.json'}: dtype is {name!r}; allowed: bfloat16, float16, float32")
    return dtype


def check_scale(stored: StoredFiles, name: str, shape: tuple[int, ...]) -> None:
    """UserError unless the scales of a weight in FP8 are there in their shape."""
    assert stored.blocks is not None
    scale = name + SCALE
    if scale not in stored.files:
        raise UserError(f"{stored.folder}: tensor {scale} is missing; {name} is stored as F8_E4M3 and needs it")
    needed = tuple(-(-size // block) for size, block in zip(shape, stored.blocks, strict=True))
    found, _ = stored.describe(scale)
    if found != needed:
        raise UserError(f"{stored.files[scale]}: tensor {scale} has shape {list(found)}; needed: {list(needed)}")


def dequantised(stored: StoredFiles, name: str, weight: Tensor) -> Tensor:
    """A weight in blocks of FP8 times its scales, rounded once to the model's dtype (DeepSeek-V3, section 3.3.2)."""
    assert stored.blocks is not None
    scale = stored.tensor(name + SCALE).float()
    bad = ~(torch.isfinite(scale) & (scale > 0))
    if bad.any():
        place = bad.nonzero()[0].tolist()
        value = float(scale[tuple(place)])
        raise UserError(
            f"{stored.files[name + SCALE]}: tensor {name}{SCALE} is {value} at {place}; needed: finite numbers > 0"
        )
    (rows, columns), (height, width) = weight.shape, stored.blocks
    out = torch.empty(weight.shape, dtype=stored.dequantised_dtype)
    for band in range(scale.shape[0]):  # a row of blocks at a time, so that fp32 copies stay small
        part = slice(band * height, min((band + 1) * height, rows))
        factor = scale[band].repeat_interleave(width)[:columns]
        out[part] = (weight[part].float() * factor).to(out.dtype)
    return out
