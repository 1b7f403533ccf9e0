"""Places what a rank holds in the tensors of a checkpoint, as rectangles, whatever the layout.

Megatron says where a local parameter lies in the checkpoint's tensor. A data rank of the distributed optimizer owns a
run of the parameter's values in row-major order, which is a few rectangles: the end of a row, whole rows, the beginning
of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory, is_main_replica
from torch import Tensor

from megalign.convert.hf.safetensors_file import Spec
from megalign.engines.megatron.groups import Groups
from megalign.engines.megatron.shard import Shard

# Without a prefix, optimizer tensors have the same names however many optimizers share the parameters.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True, slots=True)
class Block:
    """Places a run of a local tensor's values, from `first` on: `sizes` at `offset` in the checkpoint's tensor."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    first: int


@dataclass(frozen=True, slots=True)
class Held:
    """Holds a local tensor that a checkpoint has, flattened, with its blocks in order.

    main: whether this rank's copies are saved, not those of another tensor rank or pipeline stage.
    """

    values: Tensor
    blocks: tuple[Block, ...]
    main: bool
    of_expert: bool  # whether copies are on the expert-data ranks, not on the data and context ranks


@dataclass(frozen=True, slots=True)
class Part:
    """Holds the values of a rectangle, flattened, of the checkpoint's tensor `key`."""

    key: str
    spec: Spec  # of the whole tensor
    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    values: Tensor


def rectangles(sizes: Sequence[int], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Split the values from `start` to `end` of a row-major array into rectangles: yield (offset, sizes), in order."""
    if start >= end:
        return
    if not sizes:
        yield (), ()
        return
    row = math.prod(sizes[1:])
    first, last = start // row, (end - 1) // row
    if first == last:
        for offset, inside in rectangles(sizes[1:], start - first * row, end - first * row):
            yield (first, *offset), (1, *inside)
        return
    if start % row:
        yield from rectangles(sizes, start, (first + 1) * row)
        first += 1
    if end // row > first:
        yield (first, *[0] * (len(sizes) - 1)), (end // row - first, *sizes[1:])
    if end % row:
        yield from rectangles(sizes, end // row * row, end)


def parts_of(held: Held, values: Tensor, *, start: int = 0, prefix: str = "") -> Iterator[Part]:
    """Yield the rectangles of a run of values that begins at `start` of a local tensor, under a prefix of its keys.

    values: 1-D, of any dtype; the parts are views of it.
    """
    for block in held.blocks:
        numel = math.prod(block.sizes)
        at = max(start, block.first)
        end = min(start + values.numel(), block.first + numel)
        for offset, sizes in rectangles(block.sizes, at - block.first, end - block.first):
            count = math.prod(sizes)
            whole = tuple(a + b for a, b in zip(block.offset, offset, strict=True))
            spec = Spec(block.shape, values.dtype)
            yield Part(prefix + block.key, spec, whole, sizes, values[at - start : at - start + count])
            at += count


def held_tensors(shard: Shard) -> tuple[dict[str, Held], dict[str, ShardedObject]]:
    """Return the tensors of all chunks by name, and the small objects that Megatron saves beside them."""
    tensors: dict[str, Held] = {}
    objects: dict[str, ShardedObject] = {}
    for number, chunk in enumerate(shard.chunks):
        # A copy of the metadata, because Megatron adds this job's groups to it.
        for name, entry in chunk.sharded_state_dict(metadata=dict(METADATA)).items():
            if isinstance(entry, ShardedObject):
                objects[f"{number} {name}"] = entry
            else:
                tensors[f"{number} {name}"] = _held(entry)
    return tensors, objects


def _held(entry: Any) -> Held:
    """Return a local tensor with its places; RuntimeError where a place does not hold a run of its values."""
    tensor = entry.data
    placed = _flat(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
    blocks = []
    for one in placed:
        first = one.data.storage_offset() - tensor.storage_offset()
        shared = one.data.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        if not (shared and one.data.is_contiguous() and tensor.is_contiguous()):
            raise RuntimeError(f"Megatron stores {one.key} otherwise than in runs of its rows")
        sizes = (1,) * one.prepend_axis_num + tuple(one.local_shape)
        blocks.append(Block(one.key, tuple(one.global_shape), tuple(one.global_offset), sizes, first))
    blocks.sort(key=lambda block: block.first)
    replica = entry.replica_id
    of_expert = not getattr(tensor, "allreduce", True)
    # The last number is that of the data rank, which all have the same values.
    return Held(tensor.detach().view(-1), tuple(blocks), is_main_replica(replica[:-1]), of_expert)


def _flat(built: Any) -> Iterator[Any]:
    """Yield the leaves of a factory's lists and dictionaries."""
    if isinstance(built, dict | list | tuple):
        for one in built.values() if isinstance(built, dict) else built:
            yield from _flat(one)
    else:
        yield built


def weight_parts(tensors: Mapping[str, Held], groups: Groups) -> Iterator[Part]:
    """Yield this rank's share of the weights: of what data ranks hold alike, each saves an equal run."""
    for of_expert, ranks in ((False, groups.data_context), (True, groups.expert_data)):
        alike = [held for held in tensors.values() if held.main and held.of_expert == of_expert]
        total = sum(held.values.nbytes for held in alike)
        begin, end = (total * number // ranks.size() for number in (ranks.rank(), ranks.rank() + 1))
        position = 0
        for held in alike:
            size = held.values.itemsize
            low, high = (min(max(-(-(at - position) // size), 0), held.values.numel()) for at in (begin, end))
            yield from parts_of(held, held.values[low:high], start=low)
            position += held.values.nbytes
