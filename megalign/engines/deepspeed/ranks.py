"""Says which sequences and which part of them and of the model a rank computes, and with whom it sums results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from megalign.config.layout import Layout
from megalign.convert.hf.model import HFModel
from megalign.engines.deepspeed.library import deepspeed
from megalign.runtime.cpu_shims import import_megatron
from megalign.runtime.distributed import World

SHARDS = "megalign.engines.deepspeed.shard_policy"


@dataclass(frozen=True, slots=True)
class Ranks:
    """Holds this rank's index on each axis; data ranks have other sequences, neighbours share theirs.

    Neighbours are context ranks, which hold parts of the sequences, or tensor ranks, which hold parts of the model.
    """

    rank: int
    size: int
    device: torch.device
    data_rank: int
    data_size: int
    data: dist.ProcessGroup
    context: dist.ProcessGroup | None  # None: every rank has whole sequences
    tensor: dist.ProcessGroup | None = None  # None: every rank has the whole model, but for what ZeRO partitions
    shards: Any = None  # with tensor ranks, the groups that Megatron's layers use, of which the others are some
    beat: Callable[[], None] = lambda: None  # called for each micro-batch

    @property
    def tensor_rank(self) -> int:
        """Return this rank's index among those that hold parts of the model."""
        return 0 if self.tensor is None else self.tensor.rank()

    @property
    def tensor_size(self) -> int:
        """Return the number of ranks that hold parts of the model."""
        return 1 if self.tensor is None else self.tensor.size()

    @property
    def zero_size(self) -> int:
        """Return the number of ranks over which ZeRO partitions: all that hold the same part of the model."""
        return self.size // self.tensor_size


def make_ranks(world: World, layout: Layout, *, timeout_s: float) -> Ranks:
    """Create the process groups of a job; call on every rank."""
    deepspeed()
    # That of an earlier job in this process, which its engines would go on asking.
    import_module("deepspeed.utils.groups").mpu = None  # type: ignore[attr-defined]
    if layout.tensor > 1:
        import_megatron()
        # Imported here: Megatron takes seconds, and only these jobs need it.
        groups = import_module(SHARDS).make_shard_groups(layout, timeout_s=timeout_s)
        data_rank, data_size, data, tensor = groups.data_rank, groups.data_size, groups.data, groups.tensor
        return Ranks(world.rank, world.size, world.device, data_rank, data_size, data, None, tensor, groups, world.beat)
    if layout.context == 1:
        group = dist.group.WORLD
        assert group is not None
        return Ranks(world.rank, world.size, world.device, world.rank, world.size, group, None, beat=world.beat)
    rows = torch.arange(world.size).view(-1, layout.context)
    limit = timedelta(seconds=timeout_s)
    context, _ = dist.new_subgroups_by_enumeration(rows.tolist(), timeout=limit)
    data, _ = dist.new_subgroups_by_enumeration(rows.T.tolist(), timeout=limit)
    data_rank = world.rank // layout.context
    return Ranks(world.rank, world.size, world.device, data_rank, len(rows), data, context, beat=world.beat)


def has_shards(model: HFModel, tensor_size: int) -> bool:
    """Tell whether ranks have shards of Megatron's model: those of a model that the conversion tables know."""
    return tensor_size > 1 and model.config is not None


class ModelParallelUnit:
    """Answers DeepSpeed's questions about ranks of which each holds a part of the model; its word for it is mpu."""

    def __init__(self, ranks: Ranks) -> None:
        assert ranks.tensor is not None
        self.tensor: dist.ProcessGroup = ranks.tensor
        self.data = ranks.data

    def get_model_parallel_group(self) -> Any:
        """Return the group of ranks that hold the parts of one model."""
        return self.tensor

    def get_model_parallel_rank(self) -> int:
        """Return this rank's index in it."""
        return self.tensor.rank()

    def get_model_parallel_world_size(self) -> int:
        """Return its size."""
        return self.tensor.size()

    def get_data_parallel_group(self) -> Any:
        """Return the group of ranks that hold the same part, over which ZeRO partitions it."""
        return self.data

    def get_data_parallel_rank(self) -> int:
        """Return this rank's index in it."""
        return self.data.rank()

    def get_data_parallel_world_size(self) -> int:
        """Return its size."""
        return self.data.size()
