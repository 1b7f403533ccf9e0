"""What checkpoints hold, as tables: the map of a conversion, and the differences between two of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from megalign.convert.hf_config import read_model_config
from megalign.convert.megatron_source import HF_FILES, MegatronSource
from megalign.convert.reader import HFSource, resolve_model
from megalign.convert.rules import QKV, STACK2, Rule, find_rule
from megalign.convert.safetensors_file import DTYPES, NAMES, Spec
from megalign.convert.stored import StoredFiles
from megalign.convert.torch_dist import place_of
from megalign.convert.transfer import megatron_specs
from megalign.schema import UserError

CHUNK = 1 << 22  # numbers that are compared at a time


def tensor_map(hf_dir: str, *, allow_pickle: bool = False) -> Table:
    """What becomes what in `hf_to_megatron`, after its checks."""
    folder = resolve_model(hf_dir, allow_pickle=allow_pickle)
    source = HFSource(folder, read_model_config(folder), allow_pickle=allow_pickle)
    try:
        return _table(source, megatron_specs(source))
    finally:
        source.close()


def _table(source: HFSource, specs: dict[str, Spec]) -> Table:
    total = sum(spec.num_bytes for spec in specs.values())
    table = Table(title=f"{source.cfg.family}: {len(specs)} Megatron tensors, {total / 2**30:.2f} GiB")
    for column in ("Hugging Face", "layout", "Megatron", "shape", "dtype"):
        table.add_column(column, overflow="fold")
    for name, spec in specs.items():
        rule, place = find_rule(name, source.cfg)
        stored = list(dict.fromkeys(piece.name.format(**place) for piece in rule.pieces))
        key, index, _ = place_of(name, source.cfg)
        home = f"{key}{list(index) if index else ''}"
        table.add_row("\n".join(stored), _layout(rule), home, _shape(spec), _dtype(spec))
    return table


def tensor_map_back(checkpoint: Path) -> Table:
    """What becomes what in `megatron_to_hf`, after its checks."""
    source = MegatronSource(checkpoint)
    total = sum(spec.num_bytes for spec in source.specs.values())
    table = Table(title=f"{source.model.family}: {len(source.specs)} tensors, {total / 2**30:.2f} GiB")
    for column in ("Megatron", "layout", "Hugging Face", "shape", "dtype"):
        table.add_column(column, overflow="fold")
    for name, spec in source.specs.items():
        parts = source.parts[name]
        homes = dict.fromkeys(place_of(megatron, source.model)[:2] for megatron, *_ in parts)
        shown = [f"{key}{list(index) if index else ''}" for key, index in homes]
        shown = shown if len(shown) <= 3 else [shown[0], f"... {len(shown) - 2} more", shown[-1]]
        table.add_row(
            "\n".join(shown), _layout(find_rule(parts[0][0], source.model)[0]), name, _shape(spec), _dtype(spec)
        )
    return table


def _layout(rule: Rule) -> str:
    words = {id(QKV): "by group: queries, key, value", id(STACK2): "gate above up"}
    said = [words.get(id(rule.layout), "as it is")]
    piece = rule.pieces[0]
    said += ["one matrix of several"] if piece.rows else []
    said += ["rows take turns"] if piece.every > 1 else []
    said += ["stacked experts"] if piece.of_experts else []
    said += ["transposed"] if piece.transposed and len(piece.axes) == 2 else []
    said += ["vocabulary padded"] if piece.axes[0] == "vocab" else []
    return ", ".join(said)


def _shape(spec: Spec) -> str:
    return " x ".join(map(str, spec.shape)) or "scalar"


def _dtype(spec: Spec) -> str:
    return NAMES.get(spec.dtype, str(spec.dtype))


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor that is not the same in both."""

    name: str
    a: Spec | None  # None: it is not there
    b: Spec | None
    count: int = 0  # values that differ
    largest: float = 0.0  # of their differences


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints, tensor by tensor."""

    num_tensors: int
    differences: list[Difference]

    def table(self, max_rows: int) -> Table:
        """The differences, as many as fit."""
        table = Table()
        for column in ("tensor", "A", "B", "values that differ", "largest difference"):
            table.add_column(column, overflow="fold")
        for one in self.differences[:max_rows]:
            sides = ["missing" if spec is None else f"{_dtype(spec)} {_shape(spec)}" for spec in (one.a, one.b)]
            told = (str(one.count), f"{one.largest:.3g}") if one.count else ("", "")
            table.add_row(one.name, *sides, *told)
        if len(self.differences) > max_rows:
            table.add_row(f"... {len(self.differences) - max_rows} more", "", "", "", "")
        return table

    def summary(self) -> str:
        """One line."""
        missing = [sum(getattr(one, side) is None for one in self.differences) for side in "ba"]
        differing = len(self.differences) - sum(missing)
        largest = max((one.largest for one in self.differences), default=0.0)
        return (
            f"{self.num_tensors} tensors: {self.num_tensors - len(self.differences)} equal bit by bit, "
            f"{differing} differ (largest difference {largest:.3g}), {missing[0]} only in A, {missing[1]} only in B"
        )


class _Raw:
    """A Hugging Face directory as it is, without asking what model it is; quantised weights as what they stand for."""

    def __init__(self, folder: Path) -> None:
        stored = StoredFiles(folder)
        self.tensor = stored.tensor
        self.specs = {name: Spec(*stored.describe(name)) for name in stored.files}
        for name, spec in self.specs.items():
            if not isinstance(spec.dtype, torch.dtype):
                raise UserError(f"{stored.files[name]}: tensor {name} is stored as {spec.dtype}; known: {list(DTYPES)}")


def _opened(folder: Path) -> _Raw | MegatronSource:
    if (folder / "metadata.json").is_file() and (folder / HF_FILES).is_dir():
        return MegatronSource(folder)
    return _Raw(resolve_model(str(folder)))


def compare(
    a: Path,
    b: Path,
    *,
    begin: Callable[[int], None] = lambda total: None,
    read: Callable[[int], None] = lambda count: None,
) -> Comparison:
    """Every tensor of either checkpoint; UserError for a directory that is no checkpoint."""
    left, right = _opened(a), _opened(b)
    names = list(dict.fromkeys((*left.specs, *right.specs)))
    begin(sum(spec.num_bytes for spec in left.specs.values()))
    differences = []
    for name in names:
        one, other = left.specs.get(name), right.specs.get(name)
        count, largest = 0, 0.0
        if one is not None and other is not None and one.shape == other.shape:
            count, largest = _values(left.tensor(name), right.tensor(name))
        if count or one != other:
            differences.append(Difference(name, one, other, count, largest))
        read(0 if one is None else one.num_bytes)
    return Comparison(len(names), differences)


def _values(a: Tensor, b: Tensor) -> tuple[int, float]:
    """(how many values differ: in bits, or where dtypes do in size; the largest difference)."""
    count, largest = 0, 0.0
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    flat = (one.contiguous().reshape(-1) for one in (a, b))
    for x, y in zip(*(one.split(CHUNK) for one in flat), strict=True):
        other = x.view(width) != y.view(width) if x.dtype == y.dtype else x.double() != y.double()
        if other.any():
            count += int(other.sum())
            gap = (x[other].double() - y[other].double()).abs()
            largest = max(largest, float(gap.nan_to_num(nan=float("inf")).max()))
    return count, largest
