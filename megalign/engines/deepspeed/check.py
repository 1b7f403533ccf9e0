"""Checks the parts of a job's configuration that concern DeepSpeed, without weights or a process group."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator

from megalign.config.job import JobConfig, layout_of
from megalign.config.layout import Layout, divisors, problem, with_nearest
from megalign.convert.hf.model import HFModel
from megalign.convert.hf.reader import audit
from megalign.convert.rules import lora_targets
from megalign.engines.deepspeed.passed_through import check_passed_through
from megalign.engines.deepspeed.ranks import has_shards
from megalign.engines.deepspeed.ulysses import context_problem
from megalign.schema import UserError

EXPERT_LAYERS = ("gate_proj", "up_proj", "down_proj")  # one tensor holds all experts' in transformers


def check_weights(model: HFModel) -> None:
    """Refuse a model that transformers cannot build, or a checkpoint that lacks tensors."""
    if model.config is not None:
        audit(model.folder, model.config)
        return
    # Imported here: it builds on transformers, which takes seconds.
    from megalign.convert.hf.auto_source import check_auto_weights

    check_auto_weights(model)


def layout_problem(cfg: JobConfig, model: HFModel, world_size: int, *, trained: bool) -> str | None:
    """Return why the layout does not fit the ranks or the model, with the nearest ones that do; None if it fits."""
    layout = layout_of(cfg)
    message = _problem(layout, model, world_size)
    if message is None:
        return _length_problem(cfg, model)
    return with_nearest(message, layout, _working(model, world_size), world_size)


def _problem(layout: Layout, model: HFModel, world_size: int) -> str | None:
    tensor, context = layout.tensor, layout.context
    if world_size % (tensor * context):
        return (
            f"parallel.tensor x parallel.context is {tensor} x {context} = {tensor * context}: must divide the number "
            f"of ranks {world_size}, so be one of {', '.join(map(str, divisors(world_size)))}"
        )
    if tensor > 1 and context > 1:
        return (
            f"parallel.context is {context}: parallel.tensor is {tensor}, and engine.name deepspeed has one of them "
            "at a time; must be 1, or parallel.tensor"
        )
    return _tensor(tensor, model, world_size) or _context(context, model)


def _tensor(tensor: int, model: HFModel, world_size: int) -> str | None:
    if tensor == 1:
        return None
    if model.config is not None:
        if model.config.moe is not None:
            return (
                f"parallel.tensor is {tensor}: the model has experts, which engine.name deepspeed does not split; "
                "must be 1, or engine.name megatron"
            )
        return problem(Layout(tensor=tensor), model.config, world_size)
    heads = math.gcd(model.facts.num_heads, model.facts.num_kv_heads)
    if heads % tensor:
        return (
            f"parallel.tensor is {tensor}: must divide the model's attention heads {model.facts.num_heads} and "
            f"key-value heads {model.facts.num_kv_heads}; values that fit this model: "
            f"{', '.join(map(str, divisors(heads)))}"
        )
    # Imported here: they build on transformers, which takes seconds.
    from megalign.convert.hf.auto_model import meta_model
    from megalign.engines.deepspeed.plan import plan_problem

    reason = plan_problem(meta_model(model.folder), tensor)
    return None if reason is None else f"parallel.tensor is {tensor}: must be 1 for this model, because {reason}"


def _context(context: int, model: HFModel) -> str | None:
    heads = model.facts.num_heads
    if context == 1:
        return None
    reason = context_problem(heads, model.facts.num_kv_heads, context)
    if reason is not None:
        return (
            f"parallel.context is {context}: {reason}; must divide the model's attention heads {heads}, so be one of "
            f"{', '.join(map(str, divisors(heads)))}"
        )
    # Imported here: they build on transformers, which takes seconds.
    from megalign.convert.hf.auto_model import meta_model
    from megalign.engines.deepspeed.packable import packing_problem

    built = meta_model(model.folder)
    reason = packing_problem(type(built), built.config)
    return None if reason is None else f"parallel.context is {context}: must be 1 for this model, because {reason}"


def _length_problem(cfg: JobConfig, model: HFModel) -> str | None:
    """Return why sequences may be too long for transformers' rotary embedding of rows; None where none are."""
    if has_shards(model, cfg.parallel.tensor):
        return None  # Megatron's layers rotate each sequence by its own length
    # Imported here: they build on transformers, which takes seconds.
    from megalign.convert.hf.auto_model import auto_config
    from megalign.engines.deepspeed.packable import length_limit

    limit = length_limit(auto_config(model.folder))
    if limit is None or cfg.data.max_length <= limit:
        return None
    return (
        f"data.max_length is {cfg.data.max_length}: must be at most {limit} for this model on engine.name deepspeed; "
        "beyond that its rotary frequencies depend on the other sequences of a row"
    )


def _working(model: HFModel, world_size: int) -> Iterator[Layout]:
    """Yield the layouts of `world_size` ranks that work for the model."""
    for size in divisors(world_size):
        yield from (
            layout
            for layout in {Layout(tensor=size), Layout(context=size)}
            if _problem(layout, model, world_size) is None
        )


def check(cfg: JobConfig, model: HFModel) -> None:
    """Refuse missing packages, adapters on layers that the model lacks, and settings that DeepSpeed would refuse."""
    _require("deepspeed", "engine.name is 'deepspeed'", "engine.name megatron")
    if cfg.lora is not None:
        _require("peft", "lora is set", "the lora section left out")
        _check_targets(cfg, cfg.lora.targets, model)
    _check_recompute(cfg, model)
    check_passed_through(cfg.engine.deepspeed_config, cfg.engine.zero.stage)
    _check_nvme(cfg)
    if cfg.checkpoint.async_save and cfg.parallel.tensor > 1:
        raise UserError(
            f"checkpoint.async is True: parallel.tensor is {cfg.parallel.tensor}, and engine.name deepspeed joins the "
            "parts of tensor ranks while it saves; must be false"
        )


def _require(package: str, why: str, otherwise: str) -> None:
    """Refuse a job without a package that it needs."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{why}: the package {package} is missing; pip install -e .[deepspeed], or {otherwise}")


def _check_targets(cfg: JobConfig, targets: list[str], model: HFModel) -> None:
    """Refuse adapters on layers that the model lacks, and on layers that transformers' plan splits."""
    tensor = cfg.parallel.tensor
    if tensor > 1 and model.config is None:
        raise UserError(
            f"parallel.tensor is {tensor}: lora is set, and only models of the families that engine.name megatron has "
            "can have both; must be 1, or lora left out"
        )
    names = _linear_names(model) if tensor == 1 or model.config is None else lora_targets(model.config)
    for index, target in enumerate(targets):
        if target not in names:
            allowed = f"must be of {', '.join(names)}" if names else "it has no linear layer that can have one"
            raise UserError(f"lora.targets.{index} is {target!r}: no linear layer of model.path has that; {allowed}")


def _linear_names(model: HFModel) -> list[str]:
    """List the last parts of the names of the layers' matrices; of experts, which are not matrices, none."""
    # Imported here: it builds on transformers, which takes seconds.
    from torch import nn

    from megalign.convert.hf.auto_model import meta_model

    built = meta_model(model.folder)
    head = built.get_output_embeddings()
    linear = (name for name, part in built.named_modules() if isinstance(part, nn.Linear) and part is not head)
    names = {name.rpartition(".")[2] for name in linear}
    mixed = model.config is not None and model.config.moe is not None
    return sorted(names - set(EXPERT_LAYERS) if mixed else names)


def _check_recompute(cfg: JobConfig, model: HFModel) -> None:
    """Refuse recomputation of layers where transformers has none; it has some for each family of our tables."""
    if cfg.engine.recompute != "full" or model.config is not None:
        return
    # Imported here: it builds on transformers, which takes seconds.
    from megalign.convert.hf.auto_model import meta_model

    built = meta_model(model.folder)
    if not built.supports_gradient_checkpointing:
        raise UserError(
            f"engine.recompute is 'full': transformers has no activation checkpointing for {type(built).__name__}; "
            "must be none or selective"
        )


def _check_nvme(cfg: JobConfig) -> None:
    """Refuse NVMe directories that cannot be written to, and NVMe where DeepSpeed cannot compile its access to it."""
    zero = cfg.engine.deepspeed_config.get("zero_optimization", {})
    paths = {
        name: zero[name]["nvme_path"] for name in zero if name.startswith("offload_") and "nvme_path" in zero[name]
    }
    for name, path in paths.items():
        where = f"engine.deepspeed_config.zero_optimization.{name}.nvme_path"
        if not (os.path.isdir(path) and os.access(path, os.W_OK)):
            raise UserError(f"{where} is {path!r}: must be an existing directory that can be written to")
        from megalign.engines.deepspeed.library import can_use_nvme

        if not can_use_nvme():
            raise UserError(
                f"{where} is {path!r}: DeepSpeed cannot compile its access to NVMe, which needs g++, ninja and "
                "libaio's headers; must be left out, or these installed"
            )
