"""Builds the DeepSpeed engine that a job's configuration describes."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from megalign.config.job import JobConfig, layout_of
from megalign.convert.hf.auto_model import auto_config, keep_fp32, meta_model, switch_off_noise
from megalign.convert.hf.auto_names import AutoNames
from megalign.convert.hf.model import HFModel
from megalign.data.packing import MicroBatchShape
from megalign.engines.build import chunk_tokens_of, dtype_of, lora_of, temperature_of
from megalign.engines.deepspeed import adapters, gradients
from megalign.engines.deepspeed.attention import PackedRows
from megalign.engines.deepspeed.engine import DeepSpeedEngine
from megalign.engines.deepspeed.fragments import link_in_turn
from megalign.engines.deepspeed.hf_weights import HFWeights
from megalign.engines.deepspeed.library import can_compile_cpu_adam, deepspeed
from megalign.engines.deepspeed.packable import packing_problem
from megalign.engines.deepspeed.policy import HFPolicy, shape_of
from megalign.engines.deepspeed.probe import settle
from megalign.engines.deepspeed.ranks import ModelParallelUnit, Ranks, has_shards, make_ranks
from megalign.engines.deepspeed.settings import ds_config
from megalign.engines.deepspeed.shard_weights import ShardWeights
from megalign.engines.deepspeed.split_layers import split_layers, sum_gradients, without_memory
from megalign.engines.deepspeed.weights import Weights
from megalign.engines.head import describe_head, head_config
from megalign.runtime.distributed import COLLECTIVE_S, World, set_launcher_variables


def connect(cfg: JobConfig, world: World) -> Ranks:
    """Create the job's process groups; call once on every rank."""
    set_launcher_variables(world)
    return make_ranks(world, layout_of(cfg), timeout_s=COLLECTIVE_S)


def describe(cfg: JobConfig, model: HFModel, ranks: Ranks, world: World) -> str:
    """Return the ZeRO stage, the layout and what is offloaded, in words."""
    section = ds_config(cfg, zero_size=ranks.zero_size, on_cuda=world.device.type == "cuda")["zero_optimization"]
    text = f"ZeRO-{cfg.engine.zero.stage} x data {ranks.data_size}"
    text += "" if ranks.context is None else f" x context {ranks.context.size()}"
    text += "" if ranks.tensor is None else f" x tensor {ranks.tensor_size}"
    for key, what in (("offload_optimizer", "optimizer"), ("offload_param", "weights")):
        device = section.get(key, {}).get("device")
        text += "" if device is None else f", {what} {'on NVMe' if device == 'nvme' else 'in CPU memory'}"
    layers = "Megatron's" if has_shards(model, ranks.tensor_size) else "transformers'"
    return f"{text}; {layers} layers on {world.device.type}{describe_head(cfg.engine.head_kernel, world.device)}"


def build(cfg: JobConfig, model: HFModel, ranks: Ranks, world: World, *, trainable: bool) -> DeepSpeedEngine:
    """Build an engine whose weights are still to be loaded; `trainable` adds the optimizer."""
    settings = ds_config(cfg, zero_size=ranks.zero_size, on_cuda=world.device.type == "cuda")
    partitioned = cfg.engine.zero.stage == 3
    make = _shards if has_shards(model, ranks.tensor_size) else _transformers
    parts = make(cfg, model, ranks, settings, trainable=trainable)
    ds = _initialize(cfg, parts.policy, settings, ranks) if trainable or partitioned else None
    context = 1 if ranks.context is None else ranks.context.size()
    shape = MicroBatchShape(
        ranks.data_rank, ranks.data_size, multiple_of=context, attention_cost=model.facts.attention_cost
    )
    return DeepSpeedEngine(parts.policy, parts.weights, ds, ranks, shape=shape, settle=parts.settle)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Holds what differs between a transformers model and a shard of Megatron's."""

    policy: Any
    weights: Weights
    settle: Callable[[], str]


def _shards(cfg: JobConfig, model: HFModel, ranks: Ranks, settings: dict[str, Any], *, trainable: bool) -> _Parts:
    """Build this rank's shard of a model that the conversion tables know."""
    # Imported here: Megatron takes seconds, and only these jobs need it.
    from megalign.engines.deepspeed.shard_policy import build_shard_policy

    policy = build_shard_policy(cfg, model, ranks.shards, ranks.device, trainable=trainable)
    names = AutoNames(meta_model(model.folder, dtype=dtype_of(cfg)))
    return _Parts(policy, ShardWeights(policy.shard, names), lambda: "sequences run as packed rows")


def _transformers(cfg: JobConfig, model: HFModel, ranks: Ranks, settings: dict[str, Any], *, trainable: bool) -> _Parts:
    """Build transformers' own model."""
    partitioned = cfg.engine.zero.stage == 3
    recompute = cfg.engine.recompute if trainable else "none"
    if ranks.tensor is None:
        hf_model, splits = _empty_model(cfg, model, settings if partitioned else None, ranks.device), {}
    else:
        with without_memory():
            hf_model = _empty_model(cfg, model, None, ranks.device)
        splits = split_layers(hf_model, ranks.tensor, ranks.device)
    own = None  # megalign's attention, where it can be the model's; a few short sequences could not tell
    if packing_problem(type(hf_model), hf_model.config) is None:
        own = PackedRows(context=ranks.context, recompute=recompute == "selective")
    hf_model.requires_grad_(trainable)
    lora = lora_of(cfg) if trainable else None
    if lora is not None:
        adapters.add(hf_model, lora, seed=cfg.run.seed)
    if ranks.tensor is not None:
        sum_gradients(hf_model, ranks.tensor)
    if recompute == "full":
        hf_model.gradient_checkpointing_enable({"use_reentrant": False})
    head_cfg = head_config(
        cfg.engine.head_kernel,
        dtype_of(cfg),
        ranks.device,
        temperature=temperature_of(cfg),
        chunk_tokens=chunk_tokens_of(cfg),
        tp_invariant=cfg.engine.tp_invariant,
    )
    policy = HFPolicy(hf_model, head_cfg)
    names = AutoNames(meta_model(model.folder, dtype=dtype_of(cfg)))
    return _Parts(
        policy, HFWeights(hf_model, names, splits=splits, tensor=ranks.tensor), partial(settle, policy, own=own)
    )


def _empty_model(cfg: JobConfig, model: HFModel, partition_by: dict[str, Any] | None, device: torch.device) -> Any:
    """Build the transformers model with arbitrary weights; partition_by: ZeRO-3's settings."""
    # Imported here: transformers takes seconds, and a wrong configuration should not wait for them.
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.integrations.deepspeed import prevent_arange_dtype_change

    library, dtype, config = deepspeed(), dtype_of(cfg), auto_config(model.folder)
    with ExitStack() as contexts:
        contexts.enter_context(no_init_weights())
        if partition_by is not None:
            contexts.enter_context(prevent_arange_dtype_change())
            # Not told the dtype, DeepSpeed takes that of its settings; told it, it forgets it where a CPU has no fp16.
            contexts.enter_context(library.zero.Init(config_dict_or_path=partition_by))
        else:
            contexts.enter_context(device)
        hf_model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    hf_model.tie_weights()  # which construction leaves out where it initialises nothing
    keep_fp32(hf_model, dtype)
    switch_off_noise(hf_model)
    return hf_model


def _initialize(cfg: JobConfig, policy: nn.Module, settings: dict[str, Any], ranks: Ranks) -> Any:
    """Wrap the policy in DeepSpeed's engine, with an optimizer if it has trainable parameters."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = _adamw(cfg, trained) if trained else None
    mpu = None if ranks.tensor is None else ModelParallelUnit(ranks)
    with redirect_stdout(io.StringIO()):  # it prints the memory in use, whatever its log level
        ds, *_ = deepspeed().initialize(
            model=policy, optimizer=optimizer, config=settings, mpu=mpu, dist_init_required=False
        )
    if optimizer is not None:
        link_in_turn(ds)
        gradients.sum_over_ranks(ds)
        gradients.sum_in_place(ds)
        gradients.norm_in_pieces(ds)
    return ds


def _adamw(cfg: JobConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return AdamW that decays parameters of two or more dimensions only."""
    section = cfg.optimizer
    matrices = [each for each in parameters if len(shape_of(each)) > 1]
    others = [each for each in parameters if len(shape_of(each)) <= 1]
    groups = [
        {"params": matrices, "weight_decay": section.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": 1.0, "betas": section.betas, "eps": section.eps}
    if cfg.engine.zero.offload_optimizer and can_compile_cpu_adam():
        return deepspeed().ops.adam.DeepSpeedCPUAdam(groups, **options)  # type: ignore[no-any-return]
    return torch.optim.AdamW(groups, **options, fused=True)
