"""Reads ranges of parameters and optimizer state from the files of a ZeRO run, whatever its partitioning was."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalign.convert.hf.safetensors_file import Spec
from megalign.convert.zero.files import INDEX, WEIGHT, fragment_key, parse_key, read_index
from megalign.schema import UserError, reason_of


@dataclass(frozen=True, slots=True)
class _Range:
    start: int
    end: int
    file: str


class ZeroSource:
    """Reads what the ranks of a run wrote, as one; nothing but the ranges asked for is held in memory.

    The constructor checks that the files hold each value of each parameter of the index once, and nothing else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        self.handles: dict[str, Any] = {}
        self.ranges: dict[tuple[str, str], list[_Range]] = {
            (name, kind): [] for name in self.index.weights for kind in self.index.kinds
        }
        foreign = {path.name for path in folder.glob("*.safetensors")} - set(self.index.files)
        if foreign:
            raise UserError(f"{folder}: {INDEX} does not list {min(foreign)}; must be the files of one save")
        for file in self.index.files:
            self._list(file)
        for (name, kind), ranges in self.ranges.items():
            self._check(name, kind, ranges)

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Return the parameters by name, in the dtype of the weights in training."""
        return self.index.weights

    @property
    def step(self) -> int:
        """Return the optimizer's number of steps."""
        return self.index.step

    def _list(self, file: str) -> None:
        """Open a file and note its ranges."""
        path = self.folder / file
        try:
            handle = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise UserError(f"{path} is missing; {INDEX} names it") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a complete safetensors file: {reason_of(error)}") from None
        self.handles[file] = handle
        for key in handle.keys():  # noqa: SIM118  (not a mapping)
            parsed, stored = parse_key(key), handle.get_slice(key)
            shape, dtype = stored.get_shape(), stored.get_dtype()
            if parsed is None or (parsed[1], parsed[0]) not in self.ranges or len(shape) != 1 or dtype != "F32":
                raise UserError(f"{path}: tensor {key} ({dtype} {shape}) is none of the state that {INDEX} lists")
            kind, name, start = parsed
            self.ranges[name, kind].append(_Range(start, start + shape[0], file))

    def _check(self, name: str, kind: str, ranges: list[_Range]) -> None:
        """Sort the ranges of a parameter; UserError unless they hold each of its values once."""
        ranges.sort(key=lambda one: one.start)
        size, expected = math.prod(self.specs[name].shape), 0
        for one in [*ranges, _Range(size, size, "")]:
            if one.start > expected or one.end > size:
                low, high = (expected, one.start) if one.start > expected else (size, one.end)
                problem = "are in no file" if one.start > expected else "are more than it has"
                raise UserError(f"{self.folder}: values {low} to {high - 1} of {kind} {name} {problem}")
            if one.start < expected:
                raise UserError(f"{self.folder}: value {one.start} of {kind} {name} is there twice; must be once")
            expected = one.end

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Read `numel` values of a kind of a flattened parameter, from `start` on, in fp32."""
        ranges, end = self.ranges[name, kind], start + numel
        out = torch.empty(numel)
        first = max(0, bisect_right(ranges, start, key=lambda one: one.start) - 1)
        for one in ranges[first:]:
            if one.start >= end:
                break
            low, high = max(start, one.start), min(end, one.end)
            stored = self.handles[one.file].get_slice(fragment_key(kind, name, one.start))
            out[low - start : high - start] = stored[low - one.start : high - one.start]
        return out

    def weight(self, name: str) -> Tensor:
        """Read a whole parameter in its shape, rounded to the dtype of the weights in training."""
        spec = self.specs[name]
        return self.read(name, WEIGHT, 0, math.prod(spec.shape)).to(spec.dtype).reshape(spec.shape)
