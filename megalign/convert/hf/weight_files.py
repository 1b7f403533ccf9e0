"""Reads the weight files of a Hugging Face checkpoint: safetensors, or pickles where allowed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalign.convert.hf.config_json import read_json
from megalign.convert.hf.quantised import Mxfp4Experts, find_quantised
from megalign.convert.hf.safetensors_file import DTYPES
from megalign.git_lfs import refuse_pointer
from megalign.schema import UserError, reason_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class StoredFiles:
    """Reads tensors by name from the mapped weight files of a folder, and dequantises quantised ones."""

    def __init__(self, folder: Path, *, allow_pickle: bool = False) -> None:
        self.folder = folder
        self.handles: dict[Path, Any] = {}
        self.files: dict[str, Path] = {}
        paths, weight_map, index = self.find(folder, allow_pickle=allow_pickle)
        self.pickled = index == PICKLE_INDEX
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
        self.raw_files = dict(self.files)  # by stored name, scales included
        self.quantised = find_quantised(folder, self.raw_files, self._described)
        for weight in self.quantised.values():
            paths = [self.files.pop(name) for name in weight.stored_as]
            self.files[weight.name] = paths[0]

    @staticmethod
    def find(folder: Path, *, allow_pickle: bool) -> tuple[list[Path], Mapping[str, str], str]:
        """Return (files, the index's weight map, the index's name); an unsharded file wins, as in transformers."""
        choices = [(SINGLE, INDEX)] + ([(PICKLE, PICKLE_INDEX)] if allow_pickle else [])
        for single, index in choices:
            if (folder / single).is_file():
                return [folder / single], {}, index
            if (folder / index).is_file():
                weight_map = _weight_map(folder / index)
                return [folder / file for file in sorted(set(weight_map.values()))], weight_map, index
        pickled = (folder / PICKLE).is_file() or (folder / PICKLE_INDEX).is_file()
        hint = "; megalign convert reads its pickles with --allow-pickle" if pickled and not allow_pickle else ""
        raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}; only safetensors are read, never pickles{hint}")

    def describe(self, name: str) -> tuple[tuple[int, ...], Any]:
        """Return (shape, dtype) of what `tensor` returns; the format's dtype name where torch has no such dtype."""
        weight = self.quantised.get(name)
        return self._described(name) if weight is None else (weight.shape, weight.dtype)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor: a view of the mapped file, or dequantised."""
        weight = self.quantised.get(name)
        return self._read(name) if weight is None else weight.tensor(self._read)

    def expert(self, name: str, number: int) -> Tensor:
        """Return one expert's row of a tensor that stacks all experts, dequantising only that row."""
        weight = self.quantised.get(name)
        if isinstance(weight, Mxfp4Experts):
            return weight.expert(number, self._read)
        return self.tensor(name)[number]

    def _described(self, name: str) -> tuple[tuple[int, ...], Any]:
        """Read (shape, dtype) from the header."""
        handle = self._open(self.raw_files[name], INDEX)
        if isinstance(handle, dict):
            return tuple(handle[name].shape), handle[name].dtype
        header = handle.get_slice(name)
        return tuple(header.get_shape()), DTYPES.get(header.get_dtype(), header.get_dtype())

    def _read(self, name: str) -> Tensor:
        handle = self._open(self.raw_files[name], INDEX)
        tensor: Tensor = handle[name] if isinstance(handle, dict) else handle.get_tensor(name)
        return tensor

    def _open(self, path: Path, index: str) -> Any:
        if path not in self.handles:
            self.handles[path] = _unpickled(path) if self.pickled else _opened(path, index)
        return self.handles[path]

    def close(self) -> None:
        """Close the files."""
        self.handles.clear()


def _opened(path: Path, index: str) -> Any:
    if path.exists() and not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be read: Permission denied")
    refuse_pointer(path)
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {index} names it") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a complete safetensors file: {error}") from None


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Load a pickle of plain tensors; UserError where torch finds anything else in it."""
    refuse_pointer(path)
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {PICKLE_INDEX} names it") from None
    except Exception as error:
        raise UserError(f"{path} is not a pickle of plain tensors: {reason_of(error)}") from None
    pairs = content.items() if isinstance(content, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in pairs):
        raise UserError(f"{path} is not a pickle of plain tensors; must be a dictionary of them by name")
    return dict(content)


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: weight_map is {weight_map!r}; must be tensor names and their files")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{path}: weight_map.{tensor} is {file!r}; must be a file beside the index")
    return weight_map
