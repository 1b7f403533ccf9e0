"""Moves weights between a tensor-parallel shard under ZeRO and whole tensors in the names of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalign.convert import hf_parts, hf_state, load_shard, shard, unshard
from megalign.convert.hf.auto_names import AutoNames
from megalign.convert.hf.safetensors_file import Spec
from megalign.engines.deepspeed.policy import gathered, shape_of
from megalign.engines.deepspeed.weights import Read, assign, read

LORA, IN_TRANSFORMERS = ".lora_", ".default.weight"  # of an adapter's matrix in PEFT's names


class ShardWeights:
    """Reads and writes the weights of a shard; methods that return whole tensors are called on every rank.

    part: the `Shard` of a `ShardPolicy`.
    """

    def __init__(self, part: Any, names: AutoNames) -> None:
        self.shard, self.names, self.model = part, names, part.model
        self.tensor: dist.ProcessGroup = part.groups.tensor
        self.named: dict[str, Any] = part.named_parameters()
        self.megatron_name: dict[nn.Parameter, str] = {value: name for name, value in self.named.items()}
        (chunk,) = part.chunks
        self.adapter_of = {} if chunk.adapters is None else dict(chunk.adapters.by_weight)
        adapters: list[Any] = list(self.adapter_of.values())
        # {matrix of an adapter: (its PEFT name, dimension that is sharded)}
        self.peft = {value: (name, dim) for adapter in adapters for name, value, dim in adapter.parts()}
        named = {**self.megatron_name, **{value: name for value, (name, _) in self.peft.items()}}
        self.trained = {parameter: name for parameter, name in named.items() if parameter.requires_grad}

    def load(self, hf_dir: Path) -> None:
        """Fill the shard from a Hugging Face directory, reading only what this rank owns."""
        names, size = list(self.named), self.tensor.size()
        with torch.no_grad():
            for name, value in load_shard(hf_dir, self.model, names, tp_rank=self.tensor.rank(), tp_size=size):
                assign(self.named[name], value)

    def hf_tensors(self, gradient: Read | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, whole weight; with `gradient` its whole gradient), on every rank."""
        return hf_state(self.model, self._whole_tensors(gradient))

    def _whole_tensors(self, gradient: Read | None) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.named.items():
            if gradient is None:
                yield name, self._joined(parameter, self._merged(name, parameter))
            elif parameter.requires_grad:
                yield name, self._joined(parameter, gradient(parameter))

    def own_hf_tensors(self) -> Iterator[tuple[str, int | None, Tensor]]:
        """Yield (Hugging Face name, None, weight), one Megatron tensor after another on one rank after another."""
        for index, (name, full) in enumerate(self._whole_tensors(None)):
            if index % dist.get_world_size() == dist.get_rank():
                yield from hf_parts(name, full, self.model)

    def adapter_tensors(self, gradient: Read | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield (PEFT name, whole matrix; with `gradient` its whole gradient) of each adapter, on every rank."""
        for parameter, (name, _) in self.peft.items():
            yield name, self._joined(parameter, (gradient or read)(parameter))

    def adapters_off(self) -> AbstractContextManager[None]:
        """Disable the adapters inside the block."""
        return self.shard.adapters_off()

    def _merged(self, name: str, parameter: Any) -> Tensor:
        """Return this rank's part of a weight with its adapter merged."""
        adapter = self.adapter_of.get(name)
        if adapter is None:
            return read(parameter)
        with torch.no_grad(), gathered([parameter, *adapter.parameters()]):
            return adapter.merged(parameter.detach()).clone()

    def _joined(self, parameter: Any, local: Tensor) -> Tensor:
        """Join the tensor ranks' parts of a parameter, or of values that belong to it."""
        parts = [local]
        if parameter.tensor_model_parallel:
            parts = [torch.empty_like(local) for _ in range(self.tensor.size())]
            dist.all_gather(parts, local.contiguous(), group=self.tensor)
        return self._join(parameter, parts)

    def _join(self, parameter: Any, parts: Sequence[Tensor]) -> Tensor:
        if parameter in self.peft:
            _, dim = self.peft[parameter]
            return parts[0] if dim is None else torch.cat(list(parts), dim=dim)
        return unshard(self.megatron_name[parameter], parts, self.model)

    def specs(self) -> dict[str, Spec]:
        """Return shape and dtype of the whole tensors that train, in the names of transformers."""
        found: dict[str, Spec] = {}
        for parameter in self.trained:
            part = torch.empty(shape_of(parameter), dtype=parameter.dtype, device="meta")
            whole = self._join(parameter, [part] * self.tensor.size())
            found |= {name: Spec(tuple(each.shape), each.dtype) for name, each in self._renamed(parameter, whole)}
        return found

    def whole(self, parameter: Any, local: Tensor) -> dict[str, Tensor]:
        """Return the whole tensors, in the names of transformers, of which `local` is this rank's part."""
        return dict(self._renamed(parameter, self._joined(parameter, local)))

    def part(self, parameter: Any, stored: Callable[[str], Tensor]) -> Tensor:
        """Return this rank's part of what belongs to a parameter; stored: gives whole tensors by transformers' name."""
        rank, size = self.tensor.rank(), self.tensor.size()
        if parameter in self.peft:
            name, dim = self.peft[parameter]
            whole = stored(self._peft_name(name))
            return whole if dim is None else whole.chunk(size, dim=dim)[rank]
        name = self.megatron_name[parameter]
        return shard(name, lambda hf: stored(self._module_name(hf)), self.model, tp_rank=rank, tp_size=size)

    def _renamed(self, parameter: Any, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        if parameter in self.peft:
            yield self._peft_name(self.peft[parameter][0]), whole
            return
        for name, _, tensor in hf_parts(self.megatron_name[parameter], whole, self.model):
            yield self._module_name(name), tensor

    def _module_name(self, stored: str) -> str:
        """Return the name in transformers' model of a tensor of its checkpoints; in dense models it is the same one."""
        ((name, made_of),) = self.names.place([stored]).groups.items()
        if made_of != (stored,) or self.names.converts(stored):
            raise RuntimeError(f"{stored} is not a tensor of transformers' {type(self.names.model).__name__}")
        return name

    def _peft_name(self, name: str) -> str:
        """Return the name that an adapter's matrix has in transformers' model."""
        layer, _, matrix = name.rpartition(LORA)
        module = self._module_name(f"{layer}.weight").removesuffix(".weight")
        return f"{module}{LORA}{matrix.removesuffix('.weight')}{IN_TRANSFORMERS}"
