"""Writes a safetensors file tensor by tensor, in any order, each directly to its offset."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megalign.files import sync, write_at, writing

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Spec:
    """Holds a tensor's shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Return the size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """Writes exactly the tensors of `specs` to the file `path`, whole or row by row; safe for several threads.

    Several processes may write one file: one creates it (`create`), the others open it; each of them sends its
    `written` to the first, which passes it to `mark`.

    Format: the header's length in 8 bytes, the header in JSON, the tensors end to end, larger dtypes first so that all
    are aligned (https://github.com/huggingface/safetensors).
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], *, create: bool = True) -> None:
        self.path, self.specs, self.closed = path, dict(specs), False
        self.left = {name: math.prod(spec.shape) for name, spec in specs.items()}  # values not yet written
        self.written: set[tuple[str, int | None]] = set()
        self.lock = threading.Lock()
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.begin: dict[str, int] = {}
        offset = 0
        for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
            end = offset + spec.num_bytes
            header[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
            self.begin[name], offset = offset, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.first = 8 + len(text)
        with writing(path):
            self.handle = os.open(path, os.O_WRONLY | (os.O_CREAT | os.O_TRUNC if create else 0), 0o644)
        if create:
            self._put(len(text).to_bytes(8, "little") + text, 0)

    @property
    def missing(self) -> list[str]:
        """List tensors that are not yet, or not completely, written."""
        return [name for name, count in self.left.items() if count]

    def write(self, name: str, tensor: Tensor, row: int | None = None) -> None:
        """Write a tensor, or a row of its first dimension; ValueError unless it is missing, of its shape and dtype."""
        spec = self._expected(name, row)
        shape = spec.shape if row is None else spec.shape[1:]
        if tuple(tensor.shape) != shape or tensor.dtype != spec.dtype:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; announced: {spec.dtype} {shape}")
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._put(flat.numpy().data, self.first + self.begin[name] + (row or 0) * tensor.nbytes)
        self.mark(name, row)

    def _expected(self, name: str, row: int | None) -> Spec:
        """Return the spec of a tensor; ValueError where the file has none of that name, or it is already written."""
        if name not in self.specs or {(name, row), (name, None)} & self.written:
            raise ValueError(f"{name} was added twice, or is none of this file's")
        return self.specs[name]

    def mark(self, name: str, row: int | None = None) -> None:
        """Note that a tensor, or a row of it, is written; ValueError if it already was."""
        with self.lock:
            spec = self._expected(name, row)
            self.written.add((name, row))
            self.left[name] -= math.prod(spec.shape if row is None else spec.shape[1:])

    def _put(self, content: memoryview | bytes, offset: int) -> None:
        with writing(self.path):
            write_at(self.handle, content, offset)

    def close(self, *, partly: bool = False) -> None:
        """Sync the file to disk and close it; ValueError if a tensor is missing, unless others write it (`partly`)."""
        try:
            if self.missing and not partly:
                raise ValueError(f"{self.path.name}: {', '.join(self.missing)} never came")
            with writing(self.path):
                sync(self.handle)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file without checking it."""
        self.closed = True
        os.close(self.handle)


def plan_shards(specs: Mapping[str, Spec], max_bytes: int) -> list[dict[str, Spec]]:
    """Split tensors, in order, into files of at most `max_bytes`; a larger tensor gets a file of its own."""
    shards: list[dict[str, Spec]] = []
    size = 0
    for name, spec in specs.items():
        if not shards or size + spec.num_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.num_bytes
    return shards
