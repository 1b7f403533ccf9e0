"""Makes tables about checkpoints: the tensor map of a conversion, and the differences between two checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from megalign.convert.hf.config import read_model_config
from megalign.convert.hf.reader import HFSource, resolve_model
from megalign.convert.hf.safetensors_file import DTYPES, NAMES, Spec
from megalign.convert.hf.weight_files import StoredFiles
from megalign.convert.megatron.checkpoint_dir import HF_FILES, is_checkpoint
from megalign.convert.megatron.keys import checkpoint_key
from megalign.convert.rules import QKV, STACK2, Rule, find_rule
from megalign.convert.saved import SavedModel, open_saved
from megalign.convert.transfer import megatron_specs
from megalign.convert.zero.model import ZeroModel
from megalign.schema import UserError

CHUNK = 1 << 22  # values compared at a time


def tensor_map(hf_dir: str, *, allow_pickle: bool = False) -> Table:
    """Check a checkpoint as `hf_to_megatron` does, and return the table: Hugging Face tensors -> Megatron tensor."""
    folder = resolve_model(hf_dir, allow_pickle=allow_pickle)
    source = HFSource(folder, read_model_config(folder), allow_pickle=allow_pickle)
    try:
        return _table(source, megatron_specs(source))
    finally:
        source.close()


def _table(source: HFSource, specs: dict[str, Spec]) -> Table:
    total = sum(spec.num_bytes for spec in specs.values())
    table = Table(title=f"{source.model.family}: {len(specs)} Megatron tensors, {total / 2**30:.2f} GiB")
    for column in ("Hugging Face", "layout", "Megatron", "shape", "dtype"):
        table.add_column(column, overflow="fold")
    for name, spec in specs.items():
        rule, indices = find_rule(name, source.model)
        stored = list(dict.fromkeys(piece.name.format(**indices) for piece in rule.pieces))
        key, index, _ = checkpoint_key(name, source.model)
        home = f"{key}{list(index) if index else ''}"
        table.add_row("\n".join(stored), _layout(rule), home, _shape(spec), _dtype(spec))
    return table


def tensor_map_back(checkpoint: Path) -> Table:
    """Check a checkpoint as `megatron_to_hf` does, and return the table: the run's tensors -> Hugging Face tensor."""
    source = open_saved(checkpoint)
    if isinstance(source, ZeroModel):
        return _table_of_names(source)
    total = sum(spec.num_bytes for spec in source.specs.values())
    table = Table(title=f"{source.model.family}: {len(source.specs)} tensors, {total / 2**30:.2f} GiB")
    for column in ("Megatron", "layout", "Hugging Face", "shape", "dtype"):
        table.add_column(column, overflow="fold")
    for name, spec in source.specs.items():
        parts = source.parts[name]
        homes = dict.fromkeys(checkpoint_key(megatron, source.model)[:2] for megatron, *_ in parts)
        shown = [f"{key}{list(index) if index else ''}" for key, index in homes]
        shown = shown if len(shown) <= 3 else [shown[0], f"... {len(shown) - 2} more", shown[-1]]
        table.add_row(
            "\n".join(shown), _layout(find_rule(parts[0][0], source.model)[0]), name, _shape(spec), _dtype(spec)
        )
    return table


def _table_of_names(source: ZeroModel) -> Table:
    """Return the table of a checkpoint in transformers' own names; tensors converted together share a row."""
    total = sum(spec.num_bytes for spec in source.specs.values())
    table = Table(title=f"{type(source.names.model).__name__}: {len(source.specs)} tensors, {total / 2**30:.2f} GiB")
    for column in ("transformers", "read from", "Hugging Face", "shape", "dtype"):
        table.add_column(column, overflow="fold")
    for group in source.names.groups:
        home = "checkpoint" if all(name in source.trained for name in group.module) else f"{source.base}"
        home += " and adapter" if any(name.removesuffix(".weight") in source.adapted for name in group.module) else ""
        specs = [source.specs[name] for name in group.stored]
        shown = [group.stored[0], f"... {len(specs) - 2} more", group.stored[-1]] if len(specs) > 3 else group.stored
        table.add_row("\n".join(group.module), home, "\n".join(shown), _shape(specs[0]), _dtype(specs[0]))
    return table


def _layout(rule: Rule) -> str:
    """Describe in words how Hugging Face tensors are laid out in the Megatron tensor."""
    words = {id(QKV): "by group: queries, key, value", id(STACK2): "gate above up"}
    steps = [words.get(id(rule.layout), "as it is")]
    piece = rule.pieces[0]
    steps += ["one matrix of several"] if piece.rows else []
    steps += ["rows interleaved"] if piece.every > 1 else []
    steps += ["stacked experts"] if piece.of_experts else []
    steps += ["transposed"] if piece.transposed and len(piece.axes) == 2 else []
    steps += ["vocabulary padded"] if piece.axes[0] == "vocab" else []
    return ", ".join(steps)


def _shape(spec: Spec) -> str:
    return " x ".join(map(str, spec.shape)) or "scalar"


def _dtype(spec: Spec) -> str:
    return NAMES.get(spec.dtype, str(spec.dtype))


@dataclass(frozen=True, slots=True)
class Difference:
    """Describes a tensor that differs between two checkpoints."""

    name: str
    a: Spec | None  # None: missing
    b: Spec | None
    count: int = 0  # values that differ
    largest: float = 0.0  # largest absolute difference


@dataclass(frozen=True, slots=True)
class Comparison:
    """Holds the result of comparing two checkpoints tensor by tensor."""

    num_tensors: int
    differences: list[Difference]

    def table(self, max_rows: int) -> Table:
        """Return the table of differences, with at most `max_rows` rows."""
        table = Table()
        for column in ("tensor", "A", "B", "values that differ", "largest difference"):
            table.add_column(column, overflow="fold")
        for difference in self.differences[:max_rows]:
            sides = [
                "missing" if spec is None else f"{_dtype(spec)} {_shape(spec)}" for spec in (difference.a, difference.b)
            ]
            numbers = (str(difference.count), f"{difference.largest:.3g}") if difference.count else ("", "")
            table.add_row(difference.name, *sides, *numbers)
        if len(self.differences) > max_rows:
            table.add_row(f"... {len(self.differences) - max_rows} more", "", "", "", "")
        return table

    def summary(self) -> str:
        """Return a summary in one line."""
        missing = [sum(getattr(difference, side) is None for difference in self.differences) for side in "ba"]
        differing = len(self.differences) - sum(missing)
        largest = max((difference.largest for difference in self.differences), default=0.0)
        return (
            f"{self.num_tensors} tensors: {self.num_tensors - len(self.differences)} equal bit by bit, "
            f"{differing} differ (largest difference {largest:.3g}), {missing[0]} only in A, {missing[1]} only in B"
        )


class _Raw:
    """Reads a Hugging Face directory of any model, dequantising quantised weights."""

    def __init__(self, folder: Path) -> None:
        stored = StoredFiles(folder)
        self.tensor = stored.tensor
        self.specs = {name: Spec(*stored.describe(name)) for name in stored.files}
        for name, spec in self.specs.items():
            if not isinstance(spec.dtype, torch.dtype):
                raise UserError(
                    f"{stored.files[name]}: tensor {name} is stored as {spec.dtype}; must be one of {', '.join(DTYPES)}"
                )


def _opened(folder: Path) -> _Raw | SavedModel:
    if is_checkpoint(folder) and (folder / HF_FILES).is_dir():
        return open_saved(folder)
    return _Raw(resolve_model(str(folder)))


def compare(
    a: Path,
    b: Path,
    *,
    begin: Callable[[int], None] = lambda total: None,
    read: Callable[[int], None] = lambda count: None,
) -> Comparison:
    """Compare all tensors of two checkpoints; UserError for a directory that is not a checkpoint."""
    left, right = _opened(a), _opened(b)
    names = list(dict.fromkeys((*left.specs, *right.specs)))
    begin(sum(spec.num_bytes for spec in left.specs.values()))
    differences = []
    for name in names:
        first, second = left.specs.get(name), right.specs.get(name)
        count, largest = 0, 0.0
        if first is not None and second is not None and first.shape == second.shape:
            count, largest = _values(left.tensor(name), right.tensor(name))
        if count or first != second:
            differences.append(Difference(name, first, second, count, largest))
        read(0 if first is None else first.num_bytes)
    return Comparison(len(names), differences)


def _values(a: Tensor, b: Tensor) -> tuple[int, float]:
    """Return (number of values that differ, largest difference); compares bits, or values where dtypes differ."""
    count, largest = 0, 0.0
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    flat = (tensor.contiguous().reshape(-1) for tensor in (a, b))
    for x, y in zip(*(tensor.split(CHUNK) for tensor in flat), strict=True):
        differ = x.view(width) != y.view(width) if x.dtype == y.dtype else x.double() != y.double()
        if differ.any():
            count += int(differ.sum())
            gap = (x[differ].double() - y[differ].double()).abs()
            largest = max(largest, float(gap.nan_to_num(nan=float("inf")).max()))
    return count, largest
