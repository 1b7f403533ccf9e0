"""Saves and loads an engine's weights and optimizer state, at any number of ranks, any layout and any ZeRO stage.

Only what trains is written: frozen weights come from the Hugging Face directory that the engine was loaded from. Files
hold ranges of whole tensors in the names of transformers. Where ZeRO partitions whole tensors, ranks write what they
own of them; where tensor ranks have parts, tensors are joined one at a time, and ranks take turns to write them.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megalign.convert.hf.companions import copy_hf_files
from megalign.convert.hf.safetensors_file import Spec
from megalign.convert.megatron.checkpoint_dir import HF_FILES
from megalign.convert.zero.files import FOLDER, Index, PartWriter, fragment_key, write_index, write_part
from megalign.convert.zero.source import ZeroSource
from megalign.engines.deepspeed.fragments import (
    KINDS,
    fill,
    local_fragments,
    read_step,
    weights_follow,
    whole_values,
)
from megalign.engines.deepspeed.weights import Weights
from megalign.engines.saving import Saving, Written, listing
from megalign.files import write_whole, writing
from megalign.runtime.ranks import on_every_rank
from megalign.schema import UserError, reason_of

EXTRA = "extra.pt"  # plain values
HEADER_BYTES = 512  # at most, of a tensor in its file


def begin_save(
    ds: Any, weights: Weights, folder: Path, extra: dict[str, Any], *, source: Path | None, copied: bool
) -> Saving:
    """Prepare to write weights, optimizer and the plain values of `extra` into a folder.

    The Hugging Face checkpoint's other files are copied beside it, so that it can be exported again.
    """
    zero, step = folder / FOLDER, read_step(ds)
    num_bytes, write_own = (_own if weights.tensor is None else _joined)(ds, weights, zero, copied=copied)

    def write() -> Written:
        with writing(zero):
            zero.mkdir(exist_ok=True)
        files = write_own()
        return Written({f"{FOLDER}/{name}": found for name, found in listing(zero, files).items()}, files)

    def finish(abouts: Sequence[Any]) -> None:
        files = tuple(file for part in abouts for file in part)
        read_from = None if source is None else str(source.resolve())
        write_index(zero, Index(weights.specs(), KINDS, step, len(abouts), files, read_from))
        plain = io.BytesIO()
        torch.save(extra, plain)
        with writing(folder):
            write_whole(folder / EXTRA, plain.getvalue())
            if source is not None:
                copy_hf_files(source, folder / HF_FILES)

    return Saving(num_bytes, write, finish)


Plan = tuple[int, Callable[[], list[str]]]  # bytes that this rank writes; writes them and returns the files' names


def _own(ds: Any, weights: Weights, folder: Path, *, copied: bool) -> Plan:
    """Plan to write what this rank owns, without communication."""
    fragments = list(local_fragments(ds, weights.trained))
    if copied:
        fragments = [
            replace(one, tensors={kind: tensor.to("cpu", copy=True) for kind, tensor in one.tensors.items()})
            for one in fragments
        ]
    tensors = [tensor for fragment in fragments for tensor in fragment.tensors.values()]
    size = sum(tensor.nbytes for tensor in tensors) + HEADER_BYTES * (len(tensors) + 1)
    return size, lambda: write_part(folder, dist.get_rank(), fragments)


def _joined(ds: Any, weights: Weights, folder: Path, *, copied: bool) -> Plan:
    """Plan to write every so-many-th of the tensors, which all ranks join one at a time while they write."""
    if copied:
        raise ValueError("tensor ranks join their parts while they write")
    rank, size = dist.get_rank(), dist.get_world_size()
    turns = {name: index % size for index, name in enumerate(weights.specs())}
    mine = {
        fragment_key(kind, name, 0): Spec((math.prod(spec.shape),), torch.float32)
        for name, spec in weights.specs().items()
        for kind in KINDS
        if turns[name] == rank
    }
    num_bytes = sum(spec.num_bytes for spec in mine.values()) + HEADER_BYTES * (len(mine) + 1)

    def write() -> list[str]:
        writer, problem = PartWriter(folder, rank, mine), None
        names, values = weights.trained, whole_values(ds, weights.trained)
        # To its end, also after an error: ranks wait for each other in it.
        for parameter, kind in itertools.product(names, KINDS):
            whole = weights.whole(parameter, values(parameter, kind))
            try:
                for name in (each for each in whole if turns[each] == rank and problem is None):
                    writer.write(fragment_key(kind, name, 0), whole[name].reshape(-1))
            except UserError as error:
                problem = error
        writer.abandon()
        if problem is not None:
            raise problem
        return list(writer.shards)

    return num_bytes, write


def load(ds: Any, weights: Weights, folder: Path) -> dict[str, Any]:
    """Load weights and optimizer state that any layout saved; return the plain values saved with them."""

    def opened() -> tuple[ZeroSource, dict[str, Any]]:
        source = ZeroSource(folder / FOLDER)
        _check_names(source, {name: spec.shape for name, spec in weights.specs().items()})
        return source, _read_extra(folder / EXTRA)

    source, extra = on_every_rank(opened)
    fill(ds, weights.trained, source.read if weights.tensor is None else _parts(source, weights), step=source.step)
    weights_follow(ds)
    return extra


def _parts(source: ZeroSource, weights: Weights) -> Callable[[str, str, int, int], Tensor]:
    """Return a function that reads values of this rank's part of a parameter, by the name it has on this rank."""
    by_name: dict[str, Parameter] = {name: parameter for parameter, name in weights.trained.items()}

    def read(name: str, kind: str, start: int, numel: int) -> Tensor:
        def stored(whole: str) -> Tensor:
            shape = source.specs[whole].shape
            return source.read(whole, kind, 0, math.prod(shape)).view(shape)

        return weights.part(by_name[name], stored).reshape(-1)[start : start + numel]

    return read


def _check_names(source: ZeroSource, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise UserError unless a checkpoint holds exactly the parameters that the engine trains."""
    for name in (*shapes, *source.specs):
        held, wanted = source.specs.get(name), shapes.get(name)
        if held is None or held.shape != wanted:
            has = "is missing" if held is None else f"has shape {list(held.shape)}"
            must = "be absent, for it does not train here" if wanted is None else f"have shape {list(wanted)}"
            raise UserError(f"{source.folder}: parameter {name} {has}; must {must}")


def _read_extra(path: Path) -> dict[str, Any]:
    try:
        extra: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{path} cannot be read ({reason_of(error)}); must be as megalign wrote it") from None
    return extra
