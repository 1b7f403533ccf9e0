"""Low-rank adapters on a frozen model's linear layers (LoRA, arXiv 2106.09685), cut like the layers they are on.

A layer of weight W computes W x + scale B A x with scale alpha / rank, where one Megatron layer may hold several of
Hugging Face's (query, key and value; gate and up): each has an A and a B of its own, and a family's rule says how their
outputs are joined. Where W's rows are cut over tensor ranks B's are, where its columns are A's are, and what crosses
ranks is rank wide. Axes: L positions, R the adapters' ranks together.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional as F

from megalign.convert import ModelConfig
from megalign.convert.rules import find_rule, lora_target


@dataclass(frozen=True, slots=True)
class Lora:
    """Which linear layers get adapters, by their names in Hugging Face checkpoints, and how wide they are."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ranks:
    """How a model's layers are cut, and over which ranks they are copied."""

    tensor: dist.ProcessGroup
    copies: dist.ProcessGroup  # of what is not an expert's
    expert_copies: dist.ProcessGroup
    sequence_parallel: bool


class Adapter(nn.Module):
    """This rank's part of what is added to one Megatron linear layer; it begins as nothing, for B is zero.

    A is uniform within 1/sqrt(its columns), drawn from the seed and its name alone, whatever the layout.
    """

    def __init__(self, weight: str, model: ModelConfig, lora: Lora, ranks: Ranks, *, like: Tensor, seed: int) -> None:
        super().__init__()
        self.rule, place = find_rule(weight, model)
        self.model, self.lora, self.ranks = model, lora, ranks
        self.of_expert = "{e}" in self.rule.megatron
        size, rank = (1, 0) if self.cut_dim is None else (ranks.tensor.size(), ranks.tensor.rank())
        self.size = size
        self.rows: list[int] = []  # of each piece on this rank
        self.names: dict[int, str] = {}  # of the pieces that have an adapter
        for number, piece in enumerate(self.rule.pieces):
            rows, columns = piece.shape(model)
            self.rows.append(rows // size if self.cut_dim == 0 else rows)
            if not piece.is_whole or lora_target(piece.name) not in lora.targets:
                continue
            self.names[number] = name = piece.name.format(**place).removesuffix(".weight")
            a_RH = _uniform(lora.rank, columns, f"{seed} {name}")
            if self.cut_dim == 1:
                a_RH = a_RH.chunk(size, dim=1)[rank].contiguous()
            self._add(f"a{number}", a_RH.to(like), cut=1 if self.cut_dim == 1 else None)
            self._add(f"b{number}", like.new_zeros(self.rows[-1], lora.rank), cut=0 if self.cut_dim == 0 else None)

    @property
    def cut_dim(self) -> int | None:
        """Along which dimension tensor ranks cut the layer's weight."""
        return self.rule.tp_dim

    def _add(self, name: str, value: Tensor, *, cut: int | None) -> None:
        parameter = nn.Parameter(value)
        # Experts' are on one rank of the tensor group each, as if cut: none is a copy that gradient norms must skip.
        set_tensor_model_parallel_attributes(parameter, cut is not None or self.of_expert, cut or 0, 1)
        parameter.allreduce = not self.of_expert  # type: ignore[attr-defined]
        # Under sequence parallelism what is whole has seen this rank's positions only.
        partial = self.ranks.sequence_parallel and cut is None and not self.of_expert
        parameter.sequence_parallel = partial  # type: ignore[attr-defined]
        self.register_parameter(name, parameter)

    def a(self) -> Tensor:
        """[R, columns on this rank]."""
        return torch.cat([self.get_parameter(f"a{number}") for number in self.names])

    def b(self) -> Tensor:
        """[rows on this rank, R]: each piece's rows see its own part of R."""
        blocks, before, after = [], 0, self.lora.rank * len(self.names)
        for number, rows in enumerate(self.rows):
            if number in self.names:
                after -= self.lora.rank
                blocks.append(F.pad(self.get_parameter(f"b{number}"), (before, after)))
                before += self.lora.rank
            else:
                blocks.append(self.get_parameter(f"b{next(iter(self.names))}").new_zeros(rows, before + after))
        return self.rule.layout.join(blocks, self.model)

    @property
    def scale(self) -> float:
        return self.lora.alpha / self.lora.rank

    def forward(self, input_LH: Tensor) -> Tensor:
        """What the layer's output gets more, of its shape."""
        inner_LR = F.linear(input_LH, self.a()) * self.scale
        if self.size > 1:
            group, sequence_parallel = self.ranks.tensor, self.ranks.sequence_parallel
            if self.cut_dim == 0 and sequence_parallel:
                inner_LR = gather_from_sequence_parallel_region(inner_LR, tensor_parallel_output_grad=True, group=group)
            elif self.cut_dim == 0:
                inner_LR = copy_to_tensor_model_parallel_region(inner_LR, group=group)
            elif sequence_parallel:
                inner_LR = reduce_scatter_to_sequence_parallel_region(inner_LR, group=group)
            else:
                inner_LR = reduce_from_tensor_model_parallel_region(inner_LR, group=group)
        return F.linear(inner_LR, self.b())

    def merged(self, weight: Tensor) -> Tensor:
        """This rank's part of the layer's weight with the adapter in it; computed in fp32."""
        with torch.no_grad():
            return (weight.float() + self.scale * (self.b().float() @ self.a().float())).to(weight.dtype)

    def parts(self) -> Iterator[tuple[str, nn.Parameter, int | None]]:
        """(name in PEFT's words, parameter, dimension that tensor ranks cut)."""
        for number, name in self.names.items():
            yield f"{name}.lora_A.weight", self.get_parameter(f"a{number}"), 1 if self.cut_dim == 1 else None
            yield f"{name}.lora_B.weight", self.get_parameter(f"b{number}"), 0 if self.cut_dim == 0 else None

    def sharded(self) -> Iterator[tuple[str, ShardedTensor]]:
        """(local name, description for checkpoints) of every parameter."""
        local = [f"{kind}{number}" for number in self.names for kind in "ab"]
        for key, (name, parameter, cut) in zip(local, self.parts(), strict=True):
            tensor_rank = self.ranks.tensor.rank()
            offsets = () if cut is None else ((cut, tensor_rank, self.size),)
            copy = (0, tensor_rank if cut is None else 0, self.ranks.copies.rank())
            copy = (0, 0, self.ranks.expert_copies.rank()) if self.of_expert else copy
            yield key, ShardedTensor.from_rank_offsets(f"adapters.{name}", parameter, *offsets, replica_id=copy)


class Adapters(nn.Module):
    """The adapters of a model chunk, by the weights they are for; without them (`enabled`) the model is the base."""

    def __init__(self, by_weight: Mapping[str, Adapter]) -> None:
        super().__init__()
        self.by_weight = dict(by_weight)
        self.members = nn.ModuleList(by_weight.values())
        self.enabled = True

    def attach(self, linear: nn.Module, weight: str) -> None:
        """Let a layer's output include what its adapter adds."""
        adapter = self.by_weight[weight]

        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> Any:
            if not self.enabled:
                return None
            return output[0] + adapter(_normed(layer, inputs[0])), output[1]

        linear.register_forward_hook(add)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensor]:
        """Megatron's description of the parameters for `dist_checkpointing`, under names without a layout."""
        return {
            f"{prefix}members.{place}.{key}": tensor
            for place, adapter in enumerate(self.by_weight.values())
            for key, tensor in adapter.sharded()
        }


def add_adapters(
    layers: Mapping[str, nn.Module], model: ModelConfig, lora: Lora, ranks: Ranks, *, seed: int
) -> Adapters:
    """Adapters on those of a chunk's linear layers, given by the names of their weights, that `lora` means."""
    found = {
        name: Adapter(name, model, lora, ranks, like=layer.weight.detach(), seed=seed)  # type: ignore[union-attr, arg-type, operator]
        for name, layer in layers.items()
        if any(p.is_whole and lora_target(p.name) in lora.targets for p in find_rule(name, model)[0].pieces)
    }
    adapters = Adapters(found)
    for name, layer in layers.items():
        layer.register_forward_pre_hook(_plain_strides)
        if name in found:
            adapters.attach(layer, name)
    return adapters


def _plain_strides(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """With odd strides of a dimension of 1 torch multiplies frozen weights row by row, which rounds otherwise."""
    first, *others = inputs
    return first.reshape(-1, first.shape[-1]).view(first.shape), *others


def _uniform(rows: int, columns: int, seed: str) -> Tensor:
    """PEFT's beginning of A: He's uniform with slope sqrt(5)."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little") >> 1
    draw = torch.Generator().manual_seed(number)
    return (torch.rand(rows, columns, generator=draw) * 2 - 1) / math.sqrt(columns)


def _normed(layer: nn.Module, input_LH: Tensor) -> Tensor:
    """What a layer multiplies its weight with: TransformerEngine fuses the norm before it into some."""
    weight = getattr(layer, "layer_norm_weight", None)
    return input_LH if weight is None else F.rms_norm(input_LH, weight.shape, weight, layer.eps)  # type: ignore[arg-type]
