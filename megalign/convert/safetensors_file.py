"""Writing one safetensors file, each tensor straight to its place, in any order."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megalign.schema import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Spec:
    """What a tensor is, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A file at `path` that takes exactly the tensors of `specs`; safe for several threads.

    Format: the header's length in 8 bytes, the header in JSON, the tensors end to end, wider types first so that all
    are aligned (https://github.com/huggingface/safetensors).
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec]) -> None:
        self.path, self.missing, self.closed = path, dict(specs), False
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.begin: dict[str, int] = {}
        place = 0
        for name, spec in sorted(specs.items(), key=lambda one: -one[1].dtype.itemsize):
            end = place + spec.num_bytes
            header[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [place, end]}
            self.begin[name], place = place, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.first = 8 + len(text)
        try:
            self.handle = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        self._put(len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; ValueError unless it is one that is still missing, of its shape and dtype."""
        spec = self.missing.get(name)
        if spec is None:
            raise ValueError(f"{name} was added twice, or is none of this file's")
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; announced: {spec.dtype} {spec.shape}")
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._put(flat.numpy().data, self.first + self.begin[name])
        del self.missing[name]

    def _put(self, content: memoryview | bytes, place: int) -> None:
        view = memoryview(content)
        while view:
            try:
                count = os.pwrite(self.handle, view, place)
            except OSError as error:
                raise UserError(f"{self.path} cannot be written: {error.strerror}") from None
            view, place = view[count:], place + count

    def close(self) -> None:
        """Bring the file to the disk; ValueError if a tensor never came."""
        try:
            if self.missing:
                raise ValueError(f"{self.path.name}: {', '.join(self.missing)} never came")
            os.fsync(self.handle)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close without a check."""
        self.closed = True
        os.close(self.handle)


def plan_shards(specs: Mapping[str, Spec], max_bytes: int) -> list[dict[str, Spec]]:
    """Tensors in order, as many to a file as fit in `max_bytes`, and one at least."""
    shards: list[dict[str, Spec]] = []
    size = 0
    for name, spec in specs.items():
        if not shards or size + spec.num_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.num_bytes
    return shards
