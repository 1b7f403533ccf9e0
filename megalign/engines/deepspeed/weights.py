"""Fills tensors of which ZeRO may have partitioned some, and reads them whole; declares what holds all of a policy's.

"Whole" here means with all partitions of ZeRO; tensor ranks have a part of a tensor each, which `Weights` joins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalign.convert.hf.safetensors_file import Spec
from megalign.engines.deepspeed.library import deepspeed
from megalign.engines.deepspeed.policy import gathered, is_partitioned

Read = Callable[[Any], Tensor]  # parameter or buffer -> its whole value


class Weights(Protocol):
    """Moves a policy's weights between ranks and files; methods that return whole tensors are called on every rank."""

    @property
    def tensor(self) -> dist.ProcessGroup | None:
        """Return the ranks that have parts of each tensor; None where each has the whole."""

    trained: dict[nn.Parameter, str]  # the parameters that train, with names that all ranks share

    def load(self, hf_dir: Path) -> None:
        """Fill the weights from a Hugging Face directory, each rank what it keeps of them."""

    def hf_tensors(self, gradient: Read | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, whole weight; with `gradient` its whole gradient), on every rank."""

    def own_hf_tensors(self) -> Iterator[tuple[str, int | None, Tensor]]:
        """Yield (Hugging Face name, None, weight) of what this rank writes; over all ranks each comes once."""

    def adapter_tensors(self, gradient: Read | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield (PEFT name, whole matrix; with `gradient` its whole gradient) of each adapter, on every rank."""

    def adapters_off(self) -> AbstractContextManager[None]:
        """Disable the adapters inside the block."""

    def specs(self) -> dict[str, Spec]:
        """Return shape and dtype of the whole tensors that train, in the names of transformers."""

    def whole(self, parameter: Any, local: Tensor) -> dict[str, Tensor]:
        """Return the whole tensors, in the names of transformers, of which `local` is this rank's part."""

    def part(self, parameter: Any, stored: Callable[[str], Tensor]) -> Tensor:
        """Return this rank's part of what belongs to a parameter; stored: gives whole tensors by transformers' name."""


def assign(tensor: Any, value: Tensor) -> None:
    """Set a parameter or buffer to a whole value; of a partitioned one this rank keeps its part."""
    if not is_partitioned(tensor):
        tensor.data.copy_(value)
    elif tensor.ds_tensor.final_location == "nvme":
        with deepspeed().zero.GatheredParameters([tensor], modifier_rank=0):
            tensor.data.copy_(value)
    else:
        part, numel = tensor.ds_tensor, tensor.ds_tensor.numel()
        start = min(tensor.ds_process_group.rank() * numel, value.numel())
        mine = value.reshape(-1)[start : start + numel]
        part.data[: len(mine)].copy_(mine)
        if tensor.ds_status.name == "AVAILABLE":
            tensor.data.copy_(value)


def read(tensor: Any) -> Tensor:
    """Return the whole value of a parameter or buffer; called on every rank."""
    if not is_partitioned(tensor):
        return tensor.detach()  # type: ignore[no-any-return]
    with torch.no_grad(), gathered([tensor]):
        return tensor.detach().clone()  # type: ignore[no-any-return]
