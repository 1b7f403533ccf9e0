"""Estimates what a Megatron job takes, from shapes alone: the memory of each rank, and the size of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megalign.config.job import JobConfig, layout_of
from megalign.config.layout import Layout, layers_by_stage, split_layers
from megalign.convert.hf.model import HFModel
from megalign.convert.naming import megatron_names
from megalign.convert.rules import Piece, Rule, find_rule, lora_target
from megalign.engines.needs import FP32, MOMENTS, RankNeeds, layer_values, other_models
from megalign.model_config import ModelConfig
from megalign.ops.block_sizes import BLOCK_SIZES
from megalign.runtime.cpu_shims import import_megatron

MASTER = FP32  # the distributed optimizer's own copy of a weight in half precision
SAVED = FP32 + MOMENTS  # of each trained weight, besides the weight itself; in fp32 too
STAGED = {"cuda": 1 << 26, "cpu": 0}  # while a checkpoint is written at once, in CPU memory


def checkpoint_bytes(cfg: JobConfig, model: HFModel) -> int:
    """Return the size of a checkpoint's tensors, padded vocabulary included."""
    known, itemsize = model.known(), _itemsize(cfg)
    weights = trained = 0
    for name in megatron_names(known, layers=range(known.num_layers), first=True, last=True):
        rule, _ = find_rule(name, known)
        count, added = sum(_sizes(rule, known, 1)), sum(_adapter_sizes(cfg, rule, known, 1))
        weights += count + added
        trained += added if cfg.lora is not None else count
    return weights * itemsize + trained * SAVED


def rank_needs(cfg: JobConfig, model: HFModel, world_size: int, *, device: str) -> list[RankNeeds]:
    """Estimate the memory of each pipeline stage's ranks; those of one stage need the same."""
    known, layout = model.known(), layout_of(cfg)
    return [
        _stage_needs(cfg, known, layout, stage, chunks, world_size, device)
        for stage, chunks in enumerate(layers_of_stages(cfg, known))
    ]


def layers_of_stages(cfg: JobConfig, model: ModelConfig) -> list[list[list[int]]]:
    """Return the numbers of the layers in each chunk of each pipeline stage."""
    pipeline, virtual = cfg.parallel.pipeline, cfg.parallel.virtual_pipeline
    wanted = cfg.engine.megatron.get("pipeline_model_parallel_layout")
    if wanted is None:
        return layers_by_stage(split_layers(model.num_layers, pipeline * virtual), pipeline)
    # Imported here: Megatron takes seconds, and only a split of the user's own needs it.
    import_megatron()
    from megalign.models.transformer_config import layers_of_split

    return layers_by_stage(layers_of_split(wanted, pipeline), pipeline)


def _stage_needs(
    cfg: JobConfig,
    model: ModelConfig,
    layout: Layout,
    stage: int,
    chunks: list[list[int]],
    world_size: int,
    device: str,
) -> RankNeeds:
    held = range(0 if model.moe is None else model.moe.num_experts // layout.expert)
    copies = world_size // (layout.tensor * layout.pipeline)  # data and context ranks
    expert_copies = world_size // (layout.pipeline * layout.expert)
    last, itemsize = stage == layout.pipeline - 1, _itemsize(cfg)
    layers = [layer for chunk in chunks for layer in chunk]
    weights = gradients = 0
    optimizer = 0.0
    for name in megatron_names(model, layers=layers, first=stage == 0, last=last, experts=held):
        rule, _ = find_rule(name, model)
        of_expert = "{e}" in rule.megatron
        tensor = 1 if of_expert else layout.tensor
        count, added = sum(_sizes(rule, model, tensor)), sum(_adapter_sizes(cfg, rule, model, tensor))
        trained = count if cfg.lora is None else added
        weights += count + added
        gradients += trained
        optimizer += trained / (expert_copies if of_expert else copies)
    kept = MOMENTS + (MASTER if itemsize < FP32 else 0)
    copied = int(optimizer * SAVED + weights * itemsize / copies)  # beside training, of what a rank owns
    return RankNeeds(
        f"pipeline stage {stage}" if layout.pipeline > 1 else "every rank",
        weights,
        weights=weights * itemsize,
        gradients=gradients * FP32,
        optimizer=int(optimizer * kept),
        activations=int(_activations(cfg, model, layout, stage, chunks) * itemsize),
        head=2 * BLOCK_SIZES[device].kept_bytes if last else 0,
        beside=other_models(cfg, whole=lambda: _num_values(model) * itemsize, own=weights * itemsize),
        saving=copied if cfg.checkpoint.async_save else STAGED[device],
    )


def _activations(cfg: JobConfig, model: ModelConfig, layout: Layout, stage: int, chunks: list[list[int]]) -> float:
    """Return how many values backward needs: of each micro-batch between its two passes, and of each layer."""
    tokens = max(cfg.data.tokens_per_micro_batch, cfg.data.max_length) / layout.context
    values = [
        layer_values(model, layer, tensor=layout.tensor, sequence=layout.sequence)
        for chunk in chunks
        for layer in chunk
    ]
    if not values:
        return 0.0
    # Passes forward before the first backward (PipeDream-Flush; interleaved: Megatron-LM, arXiv 2104.04473).
    behind = layout.pipeline - stage - 1
    virtual = layout.virtual_pipeline
    in_flight = behind + 1 if virtual == 1 else (2 * behind + (virtual - 1) * layout.pipeline + 1) / virtual
    passing = max(values)  # gradients of the layer whose backward runs
    if cfg.engine.recompute != "full":
        return tokens * (sum(values) * in_flight + passing)
    inputs = model.hidden_size / (layout.tensor if layout.sequence else 1)
    return tokens * (len(values) * inputs * in_flight + max(values) + passing)


def _num_values(model: ModelConfig) -> int:
    """Return the number of the model's weights."""
    return sum(
        math.prod(piece.shape(model))
        for name in megatron_names(model, layers=range(model.num_layers), first=True, last=True)
        for piece in find_rule(name, model)[0].pieces
    )


def _sizes(rule: Rule, model: ModelConfig, tensor: int) -> Iterator[int]:
    """Yield the number of values of each piece of a Megatron tensor on one of `tensor` ranks."""
    for piece in rule.pieces:
        size = math.prod(_padded(piece, model))
        yield size if rule.tp_dim is None else size // tensor


def _padded(piece: Piece, model: ModelConfig) -> list[int]:
    shape = piece.shape(model)
    return [model.padded_vocab_size if axis == "vocab" else size for axis, size in zip(piece.axes, shape, strict=True)]


def _adapter_sizes(cfg: JobConfig, rule: Rule, model: ModelConfig, tensor: int) -> Iterator[int]:
    """Yield the number of values of each adapter of a Megatron tensor on one of `tensor` ranks."""
    if cfg.lora is None or "{i}" not in rule.megatron:
        return
    for piece in rule.pieces:
        if piece.is_whole and lora_target(piece.name) in cfg.lora.targets:
            sizes = list(piece.shape(model))
            if rule.tp_dim is not None:
                sizes[rule.tp_dim] //= tensor
            yield cfg.lora.rank * sum(sizes)


def _itemsize(cfg: JobConfig) -> int:
    return 2 if cfg.run.dtype == "bf16" else FP32
