"""Builds the Megatron engine that a job's configuration describes."""

from __future__ import annotations

from megalign.config.job import JobConfig, layout_of
from megalign.convert.hf.model import HFModel
from megalign.engines.build import chunk_tokens_of, dtype_of, lora_of, temperature_of
from megalign.engines.head import describe_head
from megalign.engines.megatron.engine import AdamW, MegatronEngine
from megalign.engines.megatron.groups import Groups, make_groups
from megalign.engines.megatron.shard import EngineOptions
from megalign.model_config import ModelConfig
from megalign.models.gpt import choose_layers, te_import_problem
from megalign.runtime.distributed import COLLECTIVE_S, World
from megalign.runtime.quiet import missing_packages


def connect(cfg: JobConfig) -> Groups:
    """Create the job's process groups; call once on every rank."""
    return make_groups(layout_of(cfg), timeout_s=COLLECTIVE_S)


def describe(cfg: JobConfig, model: HFModel, groups: Groups, world: World) -> str:
    """Return the layout, which layers compute the model and where, and which packages Megatron lacks."""
    text = f"tensor {groups.tensor_size} x pipeline {groups.pipeline_size}"
    # The other axes are named only where they are used.
    text += f" (virtual {groups.virtual_size})" if groups.virtual_size > 1 else ""
    text += f" x context {groups.context_size}" if groups.context_size > 1 else ""
    text += f" x data {groups.data_size}"
    text += f", experts over {groups.expert_size}" if groups.expert_size > 1 else ""
    text += f"; {_layers(cfg, model.known(), world)} layers on {world.device.type}"
    missing = missing_packages()
    if world.device.type == "cuda" and "TransformerEngine" not in missing and (broken := te_import_problem()):
        text += f" (TransformerEngine does not import: {broken})"
    text += describe_head(cfg.engine.head_kernel, world.device)
    absent = " and ".join(missing)
    return f"{text} ({absent} not installed)" if absent else text


def _layers(cfg: JobConfig, model: ModelConfig, world: World) -> str:
    """Return the kind of layers that the job runs with."""
    return choose_layers(
        cfg.engine.layers,
        model,
        on_cuda=world.device.type == "cuda",
        dtype=dtype_of(cfg),
        context_size=cfg.parallel.context,
    )


def build(cfg: JobConfig, model: HFModel, groups: Groups, world: World, *, trainable: bool) -> MegatronEngine:
    """Build an engine whose weights are still to be loaded; `trainable` adds the optimizer."""
    passed = dict(cfg.engine.megatron)
    if cfg.run.deterministic:
        passed["deterministic_mode"] = True
    options = EngineOptions(
        dtype=dtype_of(cfg),
        device=world.device,
        layers=_layers(cfg, model.known(), world),
        recompute=cfg.engine.recompute if trainable else "none",
        temperature=temperature_of(cfg),
        chunk_tokens=chunk_tokens_of(cfg),
        tp_invariant=cfg.engine.tp_invariant,
        head_kernel=cfg.engine.head_kernel,
        aux_loss_coefficient=cfg.model.aux_loss_coefficient if trainable else 0.0,
        lora=lora_of(cfg) if trainable else None,
        base=cfg.model.path,
        megatron=passed,
        beat=world.beat,
    )
    optimizer = cfg.optimizer
    adamw = AdamW(optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.clip_norm) if trainable else None
    return MegatronEngine(model.known(), groups, options, adamw=adamw, seed=cfg.run.seed)
