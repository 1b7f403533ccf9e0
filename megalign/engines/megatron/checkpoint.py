"""Saves and loads a shard and its optimizer as a `torch_dist` checkpoint, which loads at any layout.

Every rank writes what it owns into a file of its own and reads what it needs from mapped files; no tensor is sent from
rank to rank, and on a CPU none is copied before it is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import is_main_replica
from torch import Tensor

from megalign.convert.hf.companions import copy_hf_files
from megalign.convert.megatron.about import parse_about
from megalign.convert.megatron.checkpoint_dir import HF_FILES
from megalign.convert.megatron.torch_dist import TorchDistReader
from megalign.convert.megatron.torch_dist_file import HEADER_BYTES, TorchDistFile, write_index
from megalign.engines.megatron.optimizer_state import begin_state, num_updates, owned_state, saved_updates, settings
from megalign.engines.megatron.parts import Held, Part, held_tensors, parts_of, weight_parts
from megalign.engines.megatron.shard import Shard
from megalign.engines.saving import Saving, Written
from megalign.files import write_unsynced, writing
from megalign.runtime.ranks import max_over_job
from megalign.schema import UserError

STATE = "optimizer.state."  # prefix of the optimizer's tensors


def begin_save(shard: Shard, optimizer: Any, folder: Path, extra: dict[str, Any], *, copied: bool) -> Saving:
    """Prepare to write weights, optimizer state and plain values into a folder, independent of the layout.

    The Hugging Face checkpoint's other files are copied beside them, so that it can be exported again.
    """
    tensors, objects = held_tensors(shard)
    parts = saved_parts(tensors, shard, optimizer)
    if copied:
        parts = [replace(part, values=on_host(part.values)) for part in parts]
    small = {entry.unique_key: entry.data for entry in objects.values() if is_main_replica(entry.replica_id)}
    common = {"extra": extra, "about": about_shard(shard, optimizer=optimizer is not None)}
    if optimizer is not None:
        common["optimizer"] = settings(optimizer, num_updates(optimizer, most=_most(shard)))
    size = sum(part.values.numel() * part.values.itemsize for part in parts)
    size += HEADER_BYTES * (len(parts) + len(small))
    file, specs = f"__{dist.get_rank()}_0.distcp", {part.key: part.spec for part in parts}

    def write() -> Written:
        entries, listed = _write(folder / file, parts, small)
        return Written({file: listed}, (file, entries, specs))

    def finish(abouts: Sequence[Any]) -> None:
        merged = {key: spec for _, _, some in abouts for key, spec in some.items()}
        listed = {name: entries for name, entries, _ in abouts}
        _check_whole(merged, listed)
        write_index(folder, merged, listed, common, write=write_unsynced)
        with writing(folder / HF_FILES):
            if shard.source is not None:
                copy_hf_files(shard.source, folder / HF_FILES)

    return Saving(size, write, finish)


def saved_parts(tensors: dict[str, Held], shard: Shard, optimizer: Any) -> list[Part]:
    """Return the values that this rank writes, without copying them; tensors: those of `held_tensors`."""
    return [*weight_parts(tensors, shard.groups), *_state_parts(tensors, optimizer, saving=True)]


def on_host(values: Tensor) -> Tensor:
    """Copy values to host memory; those that are all one number take no memory there, as before."""
    return values if values.stride() == (0,) else values.to("cpu", copy=True)


def about_shard(shard: Shard, *, optimizer: bool) -> dict[str, Any]:
    """Return the plain values that describe a checkpoint of a shard, with an optimizer's state or without."""
    lora = shard.options.lora
    return {
        "dtype": str(shard.options.dtype),
        "optimizer": optimizer,
        "lora": None if lora is None else asdict(lora),
        "base": shard.options.base,
    }


def _most(shard: Shard) -> Any:
    return partial(max_over_job, device=shard.options.device)


def _write(path: Path, parts: Iterable[Part], objects: dict[str, Any]) -> tuple[list[list[Any]], list[int]]:
    """Write a rank's file, synced to disk; return its entries, and its size and checksum.

    UserError where writing fails.
    """
    out = TorchDistFile(path)
    try:
        for part in parts:
            out.append(part.key, part.offset, part.sizes, [part.values])
        for key, value in objects.items():
            out.append_object(key, value)
        out.close()
    finally:
        out.abandon()
    return out.entries, [out.file.size, out.file.crc]


def _check_whole(specs: dict[str, Any], listed: dict[str, Any]) -> None:
    """Raise RuntimeError where ranks have written more or less than each value once."""
    counts = dict.fromkeys(specs, 0)
    for entries in listed.values():
        for key, offset, sizes, *_ in entries:
            if offset is not None:
                counts[key] += math.prod(sizes)
    for key, spec in specs.items():
        if counts[key] != math.prod(spec.shape):
            raise RuntimeError(f"{counts[key]} values of {key} were written; must be {math.prod(spec.shape)}")


def _state_parts(tensors: dict[str, Held], optimizer: Any, *, saving: bool) -> Iterator[Part]:
    """Yield the optimizer's state that this rank owns; with `saving` without what another copy of it saves."""
    by_values = {held.values.data_ptr(): held for held in tensors.values() if held.values.numel()}
    for owned in () if optimizer is None else owned_state(optimizer):
        held = by_values[owned.parameter.data_ptr()]
        if saving and not held.main:
            continue
        for name, values in owned.tensors.items():
            yield from parts_of(held, values, start=owned.start, prefix=f"{STATE}{name}.")


def load(shard: Shard, optimizer: Any, folder: Path) -> dict[str, Any]:
    """Load a checkpoint into weights and, where both have one, the optimizer; return the plain values saved with it.

    A checkpoint without adapters leaves the shard's as they are; one with adapters must have the same settings.
    """
    reader = TorchDistReader(folder)
    reader.check_objects()
    common = reader.common()
    about = parse_about(folder, common)
    adapters = about.lora
    if adapters is not None and adapters != shard.options.lora:
        raise ValueError(f"{folder} holds adapters {adapters}, the engine {shard.options.lora}")
    tensors, objects = held_tensors(shard)
    for held in tensors.values():
        if adapters is not None or not held.blocks[0].key.startswith("adapters."):
            _fill(reader, parts_of(held, held.values))
    for number, chunk in enumerate(shard.chunks):
        mine = {name.split(" ", 1)[1]: entry for name, entry in objects.items() if name.startswith(f"{number} ")}
        states = {name: reader.object(entry.unique_key) for name, entry in mine.items()}
        # Only TransformerEngine's layers have any.
        chunk.load_state_dict({name: state for name, state in states.items() if state is not None}, strict=False)
    if optimizer is not None and about.optimizer:
        begin_state(optimizer, saved_updates(common))
        _fill(reader, _state_parts(tensors, optimizer, saving=False))
    elif optimizer is not None:
        optimizer.reload_model_params()
    extra: dict[str, Any] = common.get("extra", {})
    return extra


def _fill(reader: TorchDistReader, parts: Iterable[Part]) -> None:
    """Read parts from a checkpoint; UserError where it lacks one, or has it in another shape."""
    for part in parts:
        held = reader.specs.get(part.key)
        if held is None or held.shape != part.spec.shape:
            has = "is missing" if held is None else f"has shape {list(held.shape)}"
            raise UserError(f"{reader.folder}: tensor {part.key} {has}; must have shape {list(part.spec.shape)}")
        reader.read_into(part.key, part.offset, part.values.view(part.sizes))
