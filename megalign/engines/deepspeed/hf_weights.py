"""Moves weights between a transformers model under ZeRO and the tensors of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalign.convert.hf.auto_names import AutoNames
from megalign.convert.hf.auto_source import AutoSource
from megalign.convert.hf.model import read_model
from megalign.convert.hf.safetensors_file import Spec
from megalign.engines.deepspeed import adapters
from megalign.engines.deepspeed.policy import shape_of
from megalign.engines.deepspeed.weights import Read, assign, read


@dataclass(frozen=True, slots=True)
class Split:
    """Says how tensor ranks share a parameter: rank r has the r-th run of `sizes[r]` indices of a dimension."""

    dim: int
    sizes: tuple[int, ...]

    def part(self, whole: Tensor, rank: int) -> Tensor:
        """Return a rank's part of a whole tensor."""
        return whole.split(self.sizes, dim=self.dim)[rank]

    def joined(self, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return the whole tensor of which this rank has `local`; called on every rank of the group."""
        shape, parts = list(local.shape), []
        for rank, size in enumerate(self.sizes):
            shape[self.dim] = size
            part = local.contiguous() if rank == group.rank() else local.new_empty(shape)
            dist.broadcast(part, src=dist.get_global_rank(group, rank), group=group)
            parts.append(part)
        return torch.cat(parts, dim=self.dim)


class HFWeights:
    """Reads and writes a transformers model's weights; methods that return whole tensors are called on every rank.

    splits: the parameters of which each rank of the group `tensor` has a part. `trained` names what trains, so adapters
    must be on the model already.
    """

    def __init__(
        self,
        model: nn.Module,
        names: AutoNames,
        *,
        splits: Mapping[nn.Parameter, Split],
        tensor: dist.ProcessGroup | None,
    ) -> None:
        self.model, self.names, self.splits, self.tensor = model, names, splits, tensor
        self.trained = {value: name for name, value in model.named_parameters() if value.requires_grad}

    def load(self, hf_dir: Path) -> None:
        """Fill the model from a Hugging Face directory; a rank keeps its part of each tensor."""
        tensors, source = self._tensors(), AutoSource(read_model(hf_dir), self.names)
        filled = set()
        try:
            with torch.no_grad():
                for name, value in source:
                    assign(tensors[name], self._my_part(tensors[name], value))
                    filled.add(id(tensors[name]))
                for name in source.absent:  # routing biases of a model before it was balanced
                    assign(tensors[name], torch.zeros(self.names.tensors[name].shape))
                    filled.add(id(tensors[name]))
        finally:
            source.close()
        parameters = self.model.named_parameters()
        left = [name for name, value in parameters if id(value) not in filled and ".lora_" not in name]
        if left:
            raise RuntimeError(f"{hf_dir}: {left[0]} got no value; tied parameters must be one")

    def hf_tensors(self, gradient: Read | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, whole weight; with `gradient` its whole gradient), on every rank."""
        for tensors in self._whole_groups(gradient):
            yield from self.names.to_checkpoint(tensors).items()

    def own_hf_tensors(self) -> Iterator[tuple[str, int | None, Tensor]]:
        """Yield (Hugging Face name, None, weight), group after group on one rank after another."""
        for index, tensors in enumerate(self._whole_groups(None)):
            if index % dist.get_world_size() == dist.get_rank():
                yield from ((name, None, tensor) for name, tensor in self.names.to_checkpoint(tensors).items())

    def adapter_tensors(self, gradient: Read | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield (PEFT name, whole matrix; with `gradient` its whole gradient) of each adapter, on every rank."""
        return adapters.tensors(self.model, gradient or read)

    def adapters_off(self) -> AbstractContextManager[None]:
        """Disable the adapters inside the block."""
        return adapters.off(self.model)

    def specs(self) -> dict[str, Spec]:
        """Return shape and dtype of the whole tensors that train, in the names of transformers."""
        found = {}
        for parameter, name in self.trained.items():
            shape, split = list(shape_of(parameter)), self.splits.get(parameter)
            if split is not None:
                shape[split.dim] = sum(split.sizes)
            found[name] = Spec(tuple(shape), parameter.dtype)
        return found

    def whole(self, parameter: Any, local: Tensor) -> dict[str, Tensor]:
        """Return the whole tensor, by its name, of which `local` is this rank's part."""
        return {self.trained[parameter]: self._joined(parameter, local)}

    def part(self, parameter: Any, stored: Callable[[str], Tensor]) -> Tensor:
        """Return this rank's part of what belongs to a parameter; stored: gives whole tensors by name."""
        return self._my_part(parameter, stored(self.trained[parameter]))

    def _tensors(self) -> dict[str, Any]:
        """Return parameters and buffers by their names in a model without adapters."""
        model = self.model
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return {adapters.base_name(name): value for name, value in named}

    def _whole_groups(self, gradient: Read | None) -> Iterator[dict[str, Tensor]]:
        """Yield the whole tensors that are converted together, one group at a time."""
        tensors, local = self._tensors(), gradient or adapters.merging(self.model, read)
        for group in self.names.groups:
            yield {name: self._joined(tensors[name], local(tensors[name])) for name in group.module}

    def _joined(self, tensor: Any, local: Tensor) -> Tensor:
        split = self.splits.get(tensor)
        if split is None:
            return local
        assert self.tensor is not None
        return split.joined(local, self.tensor)

    def _my_part(self, tensor: Any, whole: Tensor) -> Tensor:
        split = self.splits.get(tensor)
        if split is None:
            return whole
        assert self.tensor is not None
        return split.part(whole, self.tensor.rank())
