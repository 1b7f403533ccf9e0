"""What a Megatron engine's tensors are called, and how they come in, go out and are saved."""

from __future__ import annotations

import queue
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async, state_dict_saver  # noqa: F401  for the shims
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy  # noqa: F401  likewise
from torch import Tensor

from megalign.convert import companions, load_shard, megatron_names, unshard
from megalign.convert.megatron_source import HF_FILES
from megalign.convert.rules import find_rule
from megalign.convert.torch_dist import TorchDistReader, read_index
from megalign.convert.writer import changed, config_changes
from megalign.engines.optimizer_state import fill_optimizers, load_optimizer
from megalign.models.lora import Lora
from megalign.schema import UserError

if TYPE_CHECKING:
    from megalign.engines.megatron import MegatronEngine
    from megalign.models.gpt import PolicyModel

# TransformerEngine fuses a norm into the linear layer behind it; the tables know it as a module of its own.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
EXPERT = re.compile(r"(.*\.experts\.local_experts\.)(\d+)(\..*)")
PEFT_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")
# Without a prefix, the optimizer's tensors are called the same however many optimizers share the parameters.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def named_parameters(engine: MegatronEngine, chunks: Sequence[PolicyModel]) -> dict[str, torch.nn.Parameter]:
    """Parameters of some of this rank's chunks, but adapters', by names with global numbers of layers and experts."""
    named = {}
    for chunk in chunks:
        layers = chunk.layer_numbers
        for name, parameter in chunk.named_parameters():
            if name.startswith("adapters."):
                continue
            if name.startswith("decoder.layers."):
                _, _, local, rest = name.split(".", 3)
                name = f"decoder.layers.{layers[int(local)]}.{FUSED_NORMS.get(rest, rest)}"
            match = EXPERT.match(name)
            if match is not None:
                name = _expert_name(match, int(match[2]) + _first_expert(engine, engine.groups.expert_rank))
            named[name] = parameter
    return named


def linear_layers(engine: MegatronEngine, chunk: PolicyModel) -> dict[str, torch.nn.Module]:
    """The modules of a chunk's matrices, by the names of their weights in `named_parameters`, vocabularies aside."""
    names = {id(parameter): name for name, parameter in named_parameters(engine, [chunk]).items()}
    found = {}
    for module in chunk.decoder.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and weight.dim() == 2:
            found[names[id(weight)]] = module
    return found


def _expert_name(match: re.Match[str], number: int) -> str:
    return f"{match[1]}{number}{match[3]}"


def _first_expert(engine: MegatronEngine, rank: int) -> int:
    """The number of the first expert that a rank of the expert group holds."""
    assert engine.model.moe is not None
    return rank * (engine.model.moe.num_experts // engine.groups.expert_size)


def load_hf(engine: MegatronEngine, hf_dir: Path) -> None:
    """Copy this rank's slices of a Hugging Face checkpoint into its parameters; fails unless every one is filled."""
    groups, parameters = engine.groups, named_parameters(engine, engine.chunks)
    experts = None
    if engine.model.moe is not None:
        experts = range(_first_expert(engine, groups.expert_rank), _first_expert(engine, groups.expert_rank + 1))
    names = megatron_names(
        engine.model,
        layers=[layer for chunk in engine.chunks for layer in chunk.layer_numbers],
        experts=experts,
        first=groups.first_stage,
        last=groups.last_stage,
    )
    if set(names) != set(parameters):
        raise RuntimeError(f"tables and model disagree on tensor names: {sorted(set(names) ^ set(parameters))}")
    with torch.no_grad():
        for name, tensor in load_shard(
            hf_dir, engine.model, names, tp_rank=groups.tensor_rank, tp_size=groups.tensor_size
        ):
            parameters[name].copy_(tensor)


def full_tensors(engine: MegatronEngine, kind: str) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) chunk by chunk and stage by stage: gathered on their stage, then broadcast to the others."""
    for chunk in engine.chunks:
        mine: dict[str, Any] = named_parameters(engine, [chunk])
        if kind == "grad":
            mine = {name: parameter for name, parameter in mine.items() if parameter.requires_grad}
        for stage, name in _by_stage(engine, list(mine)):
            here, local = stage == engine.groups.pipeline_rank, None
            if here:
                local = _whole_gradient(engine, mine[name]) if kind == "grad" else _merged(chunk, name, mine[name])
            for whole_name, full in _whole_tensors(engine, name, mine[name] if here else None, local):
                yield whole_name, _from_stage(engine, stage, full)


def own_tensors(engine: MegatronEngine) -> Iterator[tuple[str, Tensor]]:
    """(name, whole weight) of what this rank is to write of a checkpoint: over all ranks each weight comes once.

    Tensor ranks run through it together, for whichever has the turn gathers; stages and expert ranks need not wait for
    each other.
    """
    groups, model = engine.groups, engine.model
    turn = 0
    for chunk in engine.chunks:
        for name, parameter in named_parameters(engine, [chunk]).items():
            if find_rule(name, model)[0].copy:
                continue
            if EXPERT.match(name) is not None:
                if groups.expert_data.rank() == 0:
                    yield name, unshard(name, [_merged(chunk, name, parameter)], model)
                continue
            if groups.data_context.rank() > 0:
                continue
            turn = (turn + 1) % groups.tensor_size
            mine, local = groups.tensor_rank == turn, _merged(chunk, name, parameter).contiguous()
            parts = [local]
            if parameter.tensor_model_parallel and groups.tensor_size > 1:  # type: ignore[attr-defined]
                parts = [torch.empty_like(local) for _ in range(groups.tensor_size)] if mine else []
                dist.gather(local, parts or None, dst=dist.get_global_rank(groups.tensor, turn), group=groups.tensor)
            if mine:
                yield name, unshard(name, parts, model)


def adapter_tensors(engine: MegatronEngine, kind: str) -> Iterator[tuple[str, Tensor]]:
    """(PEFT's name, whole tensor) of all adapters, in the order and by the ways of `full_tensors`."""
    for chunk in engine.chunks:
        adapters = [] if chunk.adapters is None else list(chunk.adapters.by_weight.values())
        mine = {name: (parameter, cut) for adapter in adapters for name, parameter, cut in adapter.parts()}
        for stage, name in _by_stage(engine, list(mine)):
            here, local = stage == engine.groups.pipeline_rank, None
            if here:
                parameter, cut = mine[name]
                local = _whole_gradient(engine, parameter) if kind == "grad" else parameter.detach()
                if cut is not None:
                    local = torch.cat(_tensor_parts(engine, local, sharded=True), dim=cut)
            for whole_name, full in _of_experts(engine, name, local, PEFT_EXPERT):
                yield whole_name, _from_stage(engine, stage, full)


def _by_stage(engine: MegatronEngine, names: list[str]) -> Iterator[tuple[int, str]]:
    """(stage, name) of what every stage names, on all of them."""
    listing: list[Any] = [None] * engine.groups.pipeline_size
    dist.all_gather_object(listing, names, group=engine.groups.pipeline)
    for stage, found in enumerate(listing):
        yield from ((stage, name) for name in found)


def _merged(chunk: PolicyModel, name: str, parameter: torch.nn.Parameter) -> Tensor:
    """A weight as the model computes with it, its adapter included."""
    adapter = None if chunk.adapters is None else chunk.adapters.by_weight.get(name)
    return parameter.detach() if adapter is None else adapter.merged(parameter.detach())


def _whole_tensors(
    engine: MegatronEngine, name: str, parameter: torch.nn.Parameter | None, local: Tensor | None
) -> Iterator[tuple[str, Tensor | None]]:
    """The whole of what is `local` to ranks of a parameter's stage, or one of each expert rank; None elsewhere."""
    match = EXPERT.match(name)
    if match is None:
        parts = None if local is None else _tensor_parts(engine, local, sharded=parameter.tensor_model_parallel)  # type: ignore[union-attr]
        yield name, None if parts is None else unshard(name, parts, engine.model)
        return
    for whole_name, full in _of_experts(engine, name, local, EXPERT):
        yield whole_name, None if full is None else unshard(whole_name, [full], engine.model)


def _of_experts(
    engine: MegatronEngine, name: str, local: Tensor | None, pattern: re.Pattern[str]
) -> Iterator[tuple[str, Tensor | None]]:
    """What is named after an expert, from every rank of the expert group in turn; all else as it is.

    `name` counts from the experts of whichever rank named it; each rank has as many.
    """
    groups, match = engine.groups, pattern.match(name)
    if match is None:
        yield name, local
        return
    offset = int(match[2]) % _first_expert(engine, 1)
    for rank in range(groups.expert_size):
        whole_name, full = _expert_name(match, offset + _first_expert(engine, rank)), None
        if local is not None:
            full = local.clone() if rank == groups.expert_rank else torch.empty_like(local)
            if groups.expert_size > 1:
                dist.broadcast(full, src=dist.get_global_rank(groups.expert, rank), group=groups.expert)
        yield whole_name, full


def _tensor_parts(engine: MegatronEngine, local: Tensor, *, sharded: bool) -> list[Tensor]:
    if not sharded or engine.groups.tensor_size == 1:
        return [local]
    parts = [torch.empty_like(local) for _ in range(engine.groups.tensor_size)]
    dist.all_gather(parts, local.contiguous(), group=engine.groups.tensor)
    return parts


def _whole_gradient(engine: MegatronEngine, parameter: torch.nn.Parameter) -> Tensor:
    """The reduced gradient of a parameter; under ZeRO-1 each data rank holds only its range of it."""
    gradient: Tensor = parameter.main_grad.detach().clone()  # type: ignore[attr-defined]
    ranges = [
        part._get_model_param_range_map(parameter)
        for part in engine.optimizer.chained_optimizers
        if hasattr(part, "_get_model_param_range_map") and parameter in part.model_param_gbuf_map
    ]
    copies = engine.groups.data_context if getattr(parameter, "allreduce", True) else engine.groups.expert_data
    if copies.size() > 1:
        flat, owned = gradient.view(-1), torch.zeros_like(gradient).view(-1)
        for found in ranges:
            owned[found["param"].start : found["param"].end] = flat[found["param"].start : found["param"].end]
        dist.all_reduce(owned, group=copies)
        gradient = owned.view_as(gradient)
    return gradient


def _from_stage(engine: MegatronEngine, stage: int, full: Tensor | None) -> Tensor:
    """Bring a stage's tensor to all stages."""
    groups = engine.groups
    if groups.pipeline_size == 1:
        assert full is not None
        return full
    source = dist.get_global_rank(groups.pipeline, stage)
    described: list[Any] = [(tuple(full.shape), full.dtype) if full is not None else None]
    dist.broadcast_object_list(described, src=source, group=groups.pipeline)
    if full is None:
        shape, dtype = described[0]
        full = torch.empty(shape, dtype=dtype, device=engine.options.device)
    full = full.contiguous()
    dist.broadcast(full, src=source, group=groups.pipeline)
    return full


def save(engine: MegatronEngine, folder: Path, extra: dict[str, Any]) -> None:
    """Write weights, optimizer state and plain values as a `torch_dist` checkpoint, independent of the layout.

    The files of the Hugging Face checkpoint that are not weights lie beside it, so that it can become one again.
    """
    # Megatron would start a server process for the results of writers elsewhere; it outlives a rank that is killed.
    filesystem_async._results_queue = queue.Queue()
    about = {
        "dtype": str(engine.options.dtype),
        "optimizer": engine.optimizer is not None,
        "lora": None if engine.options.lora is None else asdict(engine.options.lora),
        "base": engine.options.base,
    }
    dist_checkpointing.save(_sharded_state(engine, loading=False) | {"extra": extra, "about": about}, str(folder))
    if dist.get_rank() == 0 and engine.source is not None:
        (folder / HF_FILES).mkdir(exist_ok=True)
        config = changed(engine.source / "config.json", config_changes(engine.source, engine.model))
        (folder / HF_FILES / "config.json").write_bytes(config)
        for path in companions(engine.source):
            copy = folder / HF_FILES / path.relative_to(engine.source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def about(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: its weights' dtype, whether an optimizer is inside, its adapters if any."""
    read_index(folder)  # a pickle by torch's format, which torch itself loads unchecked
    found = dist_checkpointing.load_common_state_dict(str(folder)).get("about")
    if found is None:
        raise UserError(f"{folder} was not written by megalign; needed: a checkpoint of a run or of hf_to_megatron.py")
    return dict(found)


def holds_optimizer(folder: Path) -> bool:
    """Whether a checkpoint is a run's; a converted one holds weights alone."""
    return bool(about(folder)["optimizer"])


def saved_lora(folder: Path) -> Lora | None:
    """The adapters that a checkpoint holds."""
    saved = about(folder).get("lora")
    return None if saved is None else Lora(**saved)


def load(engine: MegatronEngine, folder: Path) -> dict[str, Any]:
    """Load a checkpoint of ours into weights and, where both have one, optimizer; the plain values saved with it.

    One without adapters leaves an engine's as they are; else they must be the same.
    """
    TorchDistReader(folder).check_objects()
    adapters = saved_lora(folder)
    if adapters is not None and adapters != engine.options.lora:
        raise ValueError(f"{folder} holds adapters {adapters}, the engine {engine.options.lora}")
    if engine.adamw is not None and engine.optimizer is None:
        engine._after_load()
    with_optimizer = engine.optimizer is not None and holds_optimizer(folder)
    if with_optimizer:
        # A fresh torch optimizer has no state to be loaded into; every value of it is replaced below.
        for part in engine.optimizer.chained_optimizers:
            part._init_optimizer_states_with_dummy_values()
    wanted, kept = _sharded_state(engine, loading=True, with_optimizer=with_optimizer), {}
    for place in range(len(engine.chunks)) if adapters is None else ():
        model = wanted[f"model{place}"]
        kept[place] = {name: model.pop(name).data for name in list(model) if name.startswith("adapters.")}
    state = dist_checkpointing.load(wanted, str(folder))
    for place, chunk in enumerate(engine.chunks):
        chunk.load_state_dict(state[f"model{place}"] | kept.get(place, {}))
    if with_optimizer:
        parts = engine.optimizer.chained_optimizers  # Megatron saves one alone as it is, several by number
        for place, part in enumerate(parts):
            load_optimizer(part, state["optimizer"] if len(parts) == 1 else state["optimizer"][place])
    elif engine.optimizer is not None:
        engine.optimizer.reload_model_params()
    extra: dict[str, Any] = state.get("extra", {})
    return extra


def _sharded_state(engine: MegatronEngine, *, loading: bool, with_optimizer: bool = True) -> dict[str, Any]:
    metadata = dict(METADATA)  # Megatron puts this job's groups into what it is given
    state: dict[str, Any] = {
        f"model{place}": chunk.sharded_state_dict(metadata=metadata) for place, chunk in enumerate(engine.chunks)
    }
    if engine.optimizer is not None and with_optimizer:
        fill_optimizers(engine.optimizer, most=engine.max_over_job)
        state["optimizer"] = engine.optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=metadata)
    return state
