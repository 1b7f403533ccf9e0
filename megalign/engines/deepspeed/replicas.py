"""Lists what ranks under ZeRO hold in common: all weights over data ranks up to stage 2, few of them in stage 3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from megalign.engines.deepspeed.policy import is_partitioned
from megalign.engines.deepspeed.ranks import Ranks
from megalign.engines.replicas import Replica


def replicas(policy: Any, ranks: Ranks) -> Iterator[Replica]:
    """Yield each parameter with each group of ranks that have the same bits.

    Of parameters that ZeRO-3 partitions, every data rank has another part: only those small enough to be kept whole are
    compared over data ranks, and parts of replicated ones over tensor ranks.
    """
    world = dist.group.WORLD
    assert world is not None
    copies = world if ranks.tensor is None else ranks.data
    for name, parameter in policy.named_parameters():
        name = name.removeprefix("model.").removeprefix("chunk.")
        whole = not is_partitioned(parameter) or parameter.ds_status.name == "AVAILABLE"
        if whole:
            yield Replica(name, parameter, copies, "data")
        if ranks.tensor is None or getattr(parameter, "tensor_model_parallel", False):
            continue
        if whole or parameter.ds_tensor.final_location != "nvme":
            yield Replica(name, parameter if whole else parameter.ds_tensor, ranks.tensor, "tensor")
