"""A record of every collective that passes torch's dispatcher, asynchronous ones too, while they do their work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAMES = {"_allgather_base_": "gather", "allreduce_": "all-reduce", "reduce_": "reduce", "broadcast_": "broadcast"}
# How often each kind came with how many numbers a rank: {("gather", 26): 1}.
Calls = Counter[tuple[str, int]]


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            # the smallest tensor is what a rank puts in: a gather's room is larger
            numel = min((one.numel() for one in tree_leaves(args) if isinstance(one, Tensor)), default=0)
            self.calls[NAMES.get(name, name), numel] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(group: dist.ProcessGroup) -> Iterator[Calls]:
    """Record collectives; the group's own count says that none was missed."""
    number: Callable[[], int] = group._get_sequence_number_for_group  # type: ignore[attr-defined]
    before = number()
    with _Record() as record:
        yield record.calls
    assert number() - before == sum(record.calls.values()), record.calls


def same_on_all_ranks(value: Tensor, group: dist.ProcessGroup) -> bool:
    """Whether all ranks hold the same bits."""
    every = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, value.contiguous(), group=group)
    return all(torch.equal(value, other) for other in every)
