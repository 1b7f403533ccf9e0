"""Moves weights between a shard of a Megatron model and whole tensors: in from Hugging Face files, out for exports."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.convert import load_shard, megatron_names, unshard
from megalign.convert.rules import find_rule
from megalign.engines.megatron.names import EXPERT, PEFT_EXPERT, expert_name
from megalign.engines.megatron.shard import Shard
from megalign.models.gpt import PolicyModel

# Returns a parameter's gradient, reduced over the ranks that hold copies of the parameter.
Gradient = Callable[[torch.nn.Parameter], Tensor]


def load_hf(shard: Shard, hf_dir: Path) -> None:
    """Copy this rank's slices of a Hugging Face checkpoint into its parameters; RuntimeError unless all are filled."""
    groups, parameters = shard.groups, shard.named_parameters()
    experts = None
    if shard.model.moe is not None:
        experts = range(shard.first_expert(groups.expert_rank), shard.first_expert(groups.expert_rank + 1))
    names = megatron_names(
        shard.model,
        layers=[layer for chunk in shard.chunks for layer in chunk.layer_numbers],
        experts=experts,
        first=groups.first_stage,
        last=groups.last_stage,
    )
    if set(names) != set(parameters):
        raise RuntimeError(f"tables and model disagree on tensor names: {sorted(set(names) ^ set(parameters))}")
    with torch.no_grad():
        for name, tensor in load_shard(
            hf_dir, shard.model, names, tp_rank=groups.tensor_rank, tp_size=groups.tensor_size
        ):
            parameters[name].copy_(tensor)
    shard.source = hf_dir


def full_tensors(shard: Shard, gradient: Gradient | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield (Megatron name, whole weight; with `gradient` its whole gradient) stage by stage, on every rank.

    Each tensor is gathered on its stage and broadcast to the others.
    """
    for chunk in shard.chunks:
        mine: dict[str, Any] = shard.named_parameters(chunk)
        if gradient is not None:
            mine = {name: parameter for name, parameter in mine.items() if parameter.requires_grad}
        for stage, name in _by_stage(shard, list(mine)):
            here, local = stage == shard.groups.pipeline_rank, None
            if here:
                local = _merged(chunk, name, mine[name]) if gradient is None else gradient(mine[name])
            for whole_name, full in _whole_tensors(shard, name, mine[name] if here else None, local):
                yield whole_name, _from_stage(shard, stage, full)


def own_tensors(shard: Shard) -> Iterator[tuple[str, Tensor]]:
    """Yield (Megatron name, whole weight) of what this rank writes of an export: over all ranks each comes once.

    Tensor ranks must iterate together, because each in turn gathers a tensor; stages and expert ranks need not wait
    for each other.
    """
    groups, model = shard.groups, shard.model
    gatherer = 0  # the tensor rank that gathers this tensor
    for chunk, name, parameter in _parameters(shard):
        if find_rule(name, model)[0].copy:
            continue
        if EXPERT.match(name) is not None:
            if groups.expert_data.rank() == 0:
                yield name, unshard(name, [_merged(chunk, name, parameter)], model)
            continue
        if groups.data_context.rank() > 0:
            continue
        gatherer = (gatherer + 1) % groups.tensor_size
        local, sharded = _merged(chunk, name, parameter).contiguous(), parameter.tensor_model_parallel  # type: ignore[attr-defined]
        parts = _gathered_on(shard, gatherer, local, sharded=sharded)
        if groups.tensor_rank == gatherer:
            yield name, unshard(name, parts, model)


def _parameters(shard: Shard) -> Iterator[tuple[PolicyModel, str, torch.nn.Parameter]]:
    for chunk in shard.chunks:
        yield from ((chunk, name, parameter) for name, parameter in shard.named_parameters(chunk).items())


def _gathered_on(shard: Shard, rank: int, local: Tensor, *, sharded: bool) -> list[Tensor]:
    """Return all parts of a tensor on one tensor rank, none on the others; `local` alone if it is not sharded."""
    groups = shard.groups
    if not sharded or groups.tensor_size == 1:
        return [local]
    parts = [torch.empty_like(local) for _ in range(groups.tensor_size)] if groups.tensor_rank == rank else []
    dist.gather(local, parts or None, dst=dist.get_global_rank(groups.tensor, rank), group=groups.tensor)
    return parts


def adapter_tensors(shard: Shard, gradient: Gradient | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield (PEFT name, whole weight; with `gradient` its whole gradient) of all adapters, on every rank."""
    for chunk in shard.chunks:
        adapters = [] if chunk.adapters is None else list(chunk.adapters.by_weight.values())
        mine = {name: (parameter, dim) for adapter in adapters for name, parameter, dim in adapter.parts()}
        for stage, name in _by_stage(shard, list(mine)):
            here = stage == shard.groups.pipeline_rank
            local = _whole_adapter(shard, *mine[name], gradient) if here else None
            for whole_name, full in _of_experts(shard, name, local, PEFT_EXPERT):
                yield whole_name, _from_stage(shard, stage, full)


def _whole_adapter(
    shard: Shard, parameter: torch.nn.Parameter, shard_dim: int | None, gradient: Gradient | None
) -> Tensor:
    local = parameter.detach() if gradient is None else gradient(parameter)
    return local if shard_dim is None else torch.cat(_tensor_parts(shard, local, sharded=True), dim=shard_dim)


def _by_stage(shard: Shard, names: list[str]) -> Iterator[tuple[int, str]]:
    """All-gather parameter names over pipeline stages: yield (stage, name) on every rank."""
    listing: list[Any] = [None] * shard.groups.pipeline_size
    dist.all_gather_object(listing, names, group=shard.groups.pipeline)
    for stage, stage_names in enumerate(listing):
        yield from ((stage, name) for name in stage_names)


def _merged(chunk: PolicyModel, name: str, parameter: torch.nn.Parameter) -> Tensor:
    """Return this rank's part of a weight with its adapter merged."""
    adapter = None if chunk.adapters is None else chunk.adapters.by_weight.get(name)
    return parameter.detach() if adapter is None else adapter.merged(parameter.detach())


def _whole_tensors(
    shard: Shard, name: str, parameter: torch.nn.Parameter | None, local: Tensor | None
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the whole tensor of a parameter's parts, or one of each expert rank; None off the parameter's stage."""
    match = EXPERT.match(name)
    if match is None:
        parts = None if local is None else _tensor_parts(shard, local, sharded=parameter.tensor_model_parallel)  # type: ignore[union-attr]
        yield name, None if parts is None else unshard(name, parts, shard.model)
        return
    for whole_name, full in _of_experts(shard, name, local, EXPERT):
        yield whole_name, None if full is None else unshard(whole_name, [full], shard.model)


def _of_experts(
    shard: Shard, name: str, local: Tensor | None, pattern: re.Pattern[str]
) -> Iterator[tuple[str, Tensor | None]]:
    """Broadcast an expert's tensor from each rank of the expert group in turn; yield any other tensor as it is.

    `name` has the number of the expert on the rank that listed it; all ranks have equally many experts.
    """
    groups, match = shard.groups, pattern.match(name)
    if match is None:
        yield name, local
        return
    offset = int(match[2]) % shard.first_expert(1)
    for rank in range(groups.expert_size):
        whole_name, full = expert_name(match, offset + shard.first_expert(rank)), None
        if local is not None:
            full = local.clone() if rank == groups.expert_rank else torch.empty_like(local)
            if groups.expert_size > 1:
                dist.broadcast(full, src=dist.get_global_rank(groups.expert, rank), group=groups.expert)
        yield whole_name, full


def _tensor_parts(shard: Shard, local: Tensor, *, sharded: bool) -> list[Tensor]:
    if not sharded or shard.groups.tensor_size == 1:
        return [local]
    parts = [torch.empty_like(local) for _ in range(shard.groups.tensor_size)]
    dist.all_gather(parts, local.contiguous(), group=shard.groups.tensor)
    return parts


def _from_stage(shard: Shard, stage: int, full: Tensor | None) -> Tensor:
    """Broadcast a tensor from its stage to all stages."""
    groups = shard.groups
    if groups.pipeline_size == 1:
        assert full is not None
        return full
    source = dist.get_global_rank(groups.pipeline, stage)
    described: list[Any] = [(tuple(full.shape), full.dtype) if full is not None else None]
    dist.broadcast_object_list(described, src=source, group=groups.pipeline)
    if full is None:
        shape, dtype = described[0]
        full = torch.empty(shape, dtype=dtype, device=shard.options.device)
    full = full.contiguous()
    dist.broadcast(full, src=source, group=groups.pipeline)
    return full
