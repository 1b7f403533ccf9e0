"""Lists what ranks of a Megatron model hold in common: all weights over data ranks, some of them over tensor ranks."""

from __future__ import annotations

from collections.abc import Iterator

from megalign.engines.megatron.groups import Groups
from megalign.engines.megatron.shard import Shard
from megalign.engines.replicas import Replica
from megalign.models.lora import Adapter


def replicas(shard: Shard) -> Iterator[Replica]:
    """Yield each parameter with each group of ranks that have the same bits.

    Experts are on their expert-data ranks; norms, routers and some biases are on all tensor ranks too.
    """
    groups = shard.groups
    for name, parameter in shard.named_parameters().items():
        if not getattr(parameter, "allreduce", True):
            yield Replica(name, parameter, groups.expert_data, "expert data")
            continue
        yield Replica(name, parameter, groups.data_context, "data")
        if not getattr(parameter, "tensor_model_parallel", False):
            yield Replica(name, parameter, groups.tensor, "tensor")
    for chunk in shard.chunks:
        adapters = [] if chunk.adapters is None else chunk.adapters.by_weight.values()
        for adapter in adapters:
            yield from _of_adapter(adapter, groups)


def _of_adapter(adapter: Adapter, groups: Groups) -> Iterator[Replica]:
    for name, parameter, shard_dim in adapter.parts():
        if adapter.of_expert:
            yield Replica(name, parameter, groups.expert_data, "expert data")
            continue
        yield Replica(name, parameter, groups.data_context, "data")
        if shard_dim is None:
            yield Replica(name, parameter, groups.tensor, "tensor")
