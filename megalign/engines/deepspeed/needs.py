"""Estimates what a DeepSpeed job takes, from shapes alone: the memory of a rank, and the size of a checkpoint."""

from __future__ import annotations

import math

from megalign.config.job import JobConfig
from megalign.convert.hf.model import HFModel
from megalign.convert.hf.writer import specs_of
from megalign.convert.rules import FAMILIES, lora_target
from megalign.engines.build import dtype_of
from megalign.engines.deepspeed.settings import BUCKET
from megalign.engines.needs import FP32, MOMENTS, RankNeeds, common_layer_values, layer_values, other_models
from megalign.ops.block_sizes import BLOCK_SIZES

LIVE = 1_000_000_000  # weights that ZeRO-3 lets be whole at a time (stage3_max_live_parameters)


def checkpoint_bytes(cfg: JobConfig, model: HFModel) -> int:
    """Return the size of a checkpoint's tensors: weights and moments of what trains, in fp32."""
    trained = _num_weights(cfg, model) if cfg.lora is None else _num_adapter_weights(cfg, model)
    return trained * (FP32 + MOMENTS)


def rank_needs(cfg: JobConfig, model: HFModel, world_size: int, *, device: str) -> list[RankNeeds]:
    """Estimate the memory of a rank; all need the same."""
    zero, itemsize = cfg.engine.zero, dtype_of(cfg).itemsize
    whole = _num_weights(cfg, model)
    tensor, sharing = cfg.parallel.tensor, world_size // cfg.parallel.tensor  # ranks of ZeRO
    frozen = whole // tensor
    adapters = 0 if cfg.lora is None else _num_adapter_weights(cfg, model)
    count, trained = frozen + adapters, frozen if cfg.lora is None else adapters
    held, passing = count * itemsize, 0
    if zero.stage == 3:
        passing = min(count, LIVE) * itemsize  # gathered for a pass
        held //= sharing
    state = trained * (FP32 + MOMENTS) // sharing  # with a master copy, in fp32 too
    gradients = trained * FP32
    if zero.stage == 1 and itemsize < FP32:
        gradients += trained * itemsize  # bf16 ones, beside their sum in fp32
    elif zero.stage > 1:
        gradients //= sharing
    bucket = min(BUCKET, trained) * FP32 if sharing > 1 or zero.offload_optimizer else 0
    offloaded = state + trained * FP32 // sharing if zero.offload_optimizer else 0
    return [
        RankNeeds(
            "every rank",
            count,
            weights=0 if zero.offload_params else held,
            gradients=bucket if zero.offload_optimizer else gradients + bucket,
            optimizer=0 if zero.offload_optimizer else state,
            activations=int(_activations(cfg, model) * itemsize) + passing,
            head=2 * BLOCK_SIZES[device].kept_bytes,
            beside=other_models(cfg, whole=lambda: whole * itemsize, own=held),
            offloaded=offloaded + (held if zero.offload_params else 0),
        )
    ]


def _activations(cfg: JobConfig, model: HFModel) -> float:
    """Return how many values backward needs of a micro-batch."""
    tokens = max(cfg.data.tokens_per_micro_batch, cfg.data.max_length) / cfg.parallel.context
    facts, tensor = model.facts, cfg.parallel.tensor
    if model.config is None:
        values = [common_layer_values(facts, tensor=tensor)] * facts.num_layers
    else:
        values = [layer_values(model.config, layer, tensor=tensor) for layer in range(facts.num_layers)]
    passing = max(values)  # gradients of the layer whose backward runs
    if cfg.engine.recompute == "full":
        return tokens * (facts.num_layers * facts.hidden_size + max(values) + passing)
    return tokens * (sum(values) + passing)


def _num_weights(cfg: JobConfig, model: HFModel) -> int:
    return sum(math.prod(spec.shape) for spec in specs_of(model, dtype_of(cfg)).values())


def _num_adapter_weights(cfg: JobConfig, model: HFModel) -> int:
    assert cfg.lora is not None
    if model.config is None:
        return cfg.lora.rank * sum(_linear_sizes(cfg, model))
    known = model.config
    experts = range(0 if known.moe is None else known.moe.num_experts)
    return cfg.lora.rank * sum(
        sum(piece.shape(known))
        for rule in FAMILIES[known.family].rules
        if "{i}" in rule.megatron
        for _ in rule.indices(known, range(known.num_layers), experts)
        for piece in rule.pieces
        if piece.is_whole and lora_target(piece.name) in cfg.lora.targets
    )


def _linear_sizes(cfg: JobConfig, model: HFModel) -> list[int]:
    """Return rows plus columns of each matrix of a model of transformers that gets an adapter."""
    # Imported here: it builds on transformers, which takes seconds.
    from torch import nn

    from megalign.convert.hf.auto_model import meta_model

    assert cfg.lora is not None
    return [
        part.in_features + part.out_features
        for name, part in meta_model(model.folder).named_modules()
        if isinstance(part, nn.Linear) and name.rpartition(".")[2] in cfg.lora.targets
    ]
