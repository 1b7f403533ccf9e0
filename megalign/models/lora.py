"""Puts low-rank adapters on a frozen model's linear layers (LoRA, arXiv 2106.09685), sharded like these layers.

A layer of weight W computes W x + scale B A x with scale alpha / rank, where one Megatron layer may hold several of
Hugging Face's (query, key and value; gate and up): each has an A and a B of its own, and a family's rule says how their
outputs are joined. Where W's rows are sharded over tensor ranks, so are B's; where W's columns are, so are A's; only
[L, R] tensors are communicated between tensor ranks. Axes: L positions, R sum of the adapters' ranks.
"""

from __future__ import annotations

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

from megalign.convert.rules import Piece, find_rule, lora_target
from megalign.model_config import Lora, ModelConfig
from megalign.models.adapter_values import initial_a


@dataclass(frozen=True, slots=True)
class Ranks:
    """Holds the process groups that shard and replicate a model's layers."""

    tensor: dist.ProcessGroup
    copies: dist.ProcessGroup  # replicas of parameters outside experts
    expert_copies: dist.ProcessGroup
    sequence_parallel: bool


class Adapter(nn.Module):
    """Computes this rank's part of scale B A x for one Megatron linear layer; zero at first, because B is zero.

    A is drawn uniformly within 1/sqrt(columns), from the seed and its name alone: the same under every layout.
    """

    def __init__(self, weight: str, model: ModelConfig, lora: Lora, ranks: Ranks, *, like: Tensor, seed: int) -> None:
        super().__init__()
        self.rule, numbers = find_rule(weight, model)
        self.model, self.lora, self.ranks = model, lora, ranks
        self.of_expert = "{e}" in self.rule.megatron
        size, rank = (1, 0) if self.shard_dim is None else (ranks.tensor.size(), ranks.tensor.rank())
        self.size = size
        self.rows: list[int] = []  # rows of each piece on this rank
        self.names: dict[int, str] = {}  # {number: name} of the pieces with an adapter
        for number, piece in enumerate(self.rule.pieces):
            rows, columns = piece.shape(model)
            self.rows.append(rows // size if self.shard_dim == 0 else rows)
            if not _is_targeted(piece, lora):
                continue
            self.names[number] = name = piece.name.format(**numbers).removesuffix(".weight")
            a_RH = initial_a(lora.rank, columns, f"{seed} {name}")
            if self.shard_dim == 1:
                a_RH = a_RH.chunk(size, dim=1)[rank].contiguous()
            self._add(f"a{number}", a_RH.to(like), shard_dim=1 if self.shard_dim == 1 else None)
            self._add(
                f"b{number}", like.new_zeros(self.rows[-1], lora.rank), shard_dim=0 if self.shard_dim == 0 else None
            )

    @property
    def shard_dim(self) -> int | None:
        """Return the dimension along which the layer's weight is sharded over tensor ranks; None: replicated."""
        return self.rule.tp_dim

    def _add(self, name: str, value: Tensor, *, shard_dim: int | None) -> None:
        parameter = nn.Parameter(value)
        # Experts' adapters count as sharded: gradient norms skip replicas, and each is on one tensor rank only.
        set_tensor_model_parallel_attributes(parameter, shard_dim is not None or self.of_expert, shard_dim or 0, 1)
        parameter.allreduce = not self.of_expert  # type: ignore[attr-defined]
        # Under sequence parallelism a replicated matrix's gradient covers this rank's positions only.
        partial = self.ranks.sequence_parallel and shard_dim is None and not self.of_expert
        parameter.sequence_parallel = partial  # type: ignore[attr-defined]
        self.register_parameter(name, parameter)

    def a(self) -> Tensor:
        """Return the A matrices of all pieces, [R, columns on this rank]."""
        return torch.cat([self.get_parameter(f"a{number}") for number in self.names])

    def b(self) -> Tensor:
        """Return the B matrices of all pieces, block-diagonal [rows on this rank, R]."""
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
        """Return the factor of B A x: alpha / rank."""
        return self.lora.alpha / self.lora.rank

    def forward(self, input_LH: Tensor) -> Tensor:
        """Return the adapter's addition to the layer's output, in its shape."""
        inner_LR = F.linear(input_LH, self.a()) * self.scale
        if self.size > 1:
            group, sequence_parallel = self.ranks.tensor, self.ranks.sequence_parallel
            if self.shard_dim == 0 and sequence_parallel:
                inner_LR = gather_from_sequence_parallel_region(inner_LR, tensor_parallel_output_grad=True, group=group)
            elif self.shard_dim == 0:
                inner_LR = copy_to_tensor_model_parallel_region(inner_LR, group=group)
            elif sequence_parallel:
                inner_LR = reduce_scatter_to_sequence_parallel_region(inner_LR, group=group)
            else:
                inner_LR = reduce_from_tensor_model_parallel_region(inner_LR, group=group)
        return F.linear(inner_LR, self.b())

    def merged(self, weight: Tensor) -> Tensor:
        """Return this rank's part of the layer's weight with the adapter merged in fp32."""
        with torch.no_grad():
            return (weight.float() + self.scale * (self.b().float() @ self.a().float())).to(weight.dtype)

    def parts(self) -> Iterator[tuple[str, nn.Parameter, int | None]]:
        """Yield (PEFT name, parameter, dimension sharded over tensor ranks) of every matrix."""
        for number, name in self.names.items():
            yield f"{name}.lora_A.weight", self.get_parameter(f"a{number}"), 1 if self.shard_dim == 1 else None
            yield f"{name}.lora_B.weight", self.get_parameter(f"b{number}"), 0 if self.shard_dim == 0 else None

    def sharded(self) -> Iterator[tuple[str, ShardedTensor]]:
        """Yield (local name, Megatron's sharded tensor) of every parameter."""
        local = [f"{kind}{number}" for number in self.names for kind in "ab"]
        for key, (name, parameter, shard_dim) in zip(local, self.parts(), strict=True):
            tensor_rank = self.ranks.tensor.rank()
            offsets = () if shard_dim is None else ((shard_dim, tensor_rank, self.size),)
            copy = (0, tensor_rank if shard_dim is None else 0, self.ranks.copies.rank())
            copy = (0, 0, self.ranks.expert_copies.rank()) if self.of_expert else copy
            yield key, ShardedTensor.from_rank_offsets(f"adapters.{name}", parameter, *offsets, replica_id=copy)


class Adapters(nn.Module):
    """Holds a model chunk's adapters by weight name; with `enabled` False the chunk computes the base model."""

    def __init__(self, by_weight: Mapping[str, Adapter]) -> None:
        super().__init__()
        self.by_weight = dict(by_weight)
        self.members = nn.ModuleList(by_weight.values())
        self.enabled = True

    def attach(self, linear: nn.Module, weight: str) -> None:
        """Add an adapter's output to its layer's with a forward hook."""
        adapter = self.by_weight[weight]

        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> Any:
            if not self.enabled:
                return None
            return output[0] + adapter(_normed(layer, inputs[0])), output[1]

        linear.register_forward_hook(add)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensor]:
        """Return Megatron's sharded tensors for `dist_checkpointing`, under names that hold for every layout."""
        return {
            f"{prefix}members.{number}.{key}": tensor
            for number, adapter in enumerate(self.by_weight.values())
            for key, tensor in adapter.sharded()
        }


def add_adapters(
    layers: Mapping[str, nn.Module], model: ModelConfig, lora: Lora, ranks: Ranks, *, seed: int
) -> Adapters:
    """Put adapters on the linear layers that `lora` targets; layers: {name of the weight: layer}."""
    by_weight = {
        name: Adapter(name, model, lora, ranks, like=layer.weight.detach(), seed=seed)  # type: ignore[union-attr, arg-type, operator]
        for name, layer in layers.items()
        if any(_is_targeted(piece, lora) for piece in find_rule(name, model)[0].pieces)
    }
    adapters = Adapters(by_weight)
    for name, layer in layers.items():
        layer.register_forward_pre_hook(plain_strides)
        if name in by_weight:
            adapters.attach(layer, name)
    return adapters


def _is_targeted(piece: Piece, lora: Lora) -> bool:
    """Tell whether a piece of a layer's weight gets an adapter."""
    return piece.is_whole and lora_target(piece.name) in lora.targets


def plain_strides(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give the input plain strides: with others torch multiplies frozen weights row by row and rounds differently."""
    first, *others = inputs
    return first.reshape(-1, first.shape[-1]).view(first.shape), *others


def _normed(layer: nn.Module, input_LH: Tensor) -> Tensor:
    """Return the tensor that a layer multiplies by its weight: TransformerEngine fuses the norm into some layers."""
    weight = getattr(layer, "layer_norm_weight", None)
    return input_LH if weight is None else F.rms_norm(input_LH, weight.shape, weight, layer.eps)  # type: ignore[arg-type]
