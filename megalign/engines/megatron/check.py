"""Checks the parts of a job's configuration that concern Megatron, without a model or a process group."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable

from megalign.config.job import JobConfig, layout_of
from megalign.config.layout import refusal
from megalign.config.megatron_keys import MEGATRON_SETTINGS
from megalign.convert.hf.model import HFModel
from megalign.convert.hf.reader import audit
from megalign.convert.rules import lora_targets
from megalign.model_config import ModelFacts
from megalign.runtime.cpu_shims import import_megatron
from megalign.schema import UserError, shorten


def check_weights(model: HFModel) -> None:
    """Refuse a model that the conversion tables lack, or a checkpoint that lacks tensors."""
    audit(model.folder, model.known())


def layout_problem(cfg: JobConfig, model: HFModel, world_size: int, *, trained: bool) -> str | None:
    """Return why the layout does not fit the ranks or the model, with the nearest ones that do; None if it fits."""
    problem = refusal(layout_of(cfg), model.known(), world_size, trained=trained)
    coefficient = cfg.model.aux_loss_coefficient
    if problem is None and trained and coefficient and model.known().moe is None:
        return f"model.aux_loss_coefficient is {coefficient}: the model has no experts; must be 0"
    return problem


def check(cfg: JobConfig, model: HFModel) -> None:
    """Refuse adapters on layers that the model lacks, and passed-through keys that Megatron lacks or must not get."""
    targets = lora_targets(model.known())
    for index, target in enumerate(() if cfg.lora is None else cfg.lora.targets):
        if target not in targets:
            raise UserError(
                f"lora.targets.{index} is {target!r}: no layer of model.path has that; must be of {', '.join(targets)}"
            )
    if cfg.engine.megatron:
        _check_passed_through(cfg.engine.megatron)
        _check_split(cfg, model.facts)


def _check_passed_through(keys: Iterable[str]) -> None:
    """Refuse a key of `engine.megatron` that none of Megatron's configurations has."""
    # Imported here: Megatron takes seconds, and most jobs pass nothing through.
    import_megatron()
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = {*DistributedDataParallelConfig.__dataclass_fields__, *TransformerConfig.__dataclass_fields__}
    for key in keys:
        if key not in known:
            nearest = ", ".join(difflib.get_close_matches(key, sorted(known), n=3)) or "none"
            raise UserError(
                f"engine.megatron.{key} is not a known key; must be a field of Megatron-Core's TransformerConfig or "
                f"DistributedDataParallelConfig; near it: {nearest}"
            )
        if not any(fnmatch.fnmatch(key, pattern) for pattern in MEGATRON_SETTINGS):
            raise UserError(
                f"engine.megatron.{key} is not a setting of speed or memory alone; must be one of "
                f"{', '.join(MEGATRON_SETTINGS)}"
            )


def _check_split(cfg: JobConfig, model: ModelFacts) -> None:
    """Refuse a split of layers over stages that Megatron could not build."""
    wanted = cfg.engine.megatron.get("pipeline_model_parallel_layout")
    if wanted is None:
        return
    # Imported here: Megatron takes seconds.
    from megalign.models.transformer_config import split_problem

    parallel = cfg.parallel
    reason = split_problem(wanted, model.num_layers, parallel.pipeline, parallel.virtual_pipeline)
    if reason is not None:
        stages = parallel.pipeline * parallel.virtual_pipeline
        raise UserError(
            f"engine.megatron.pipeline_model_parallel_layout is {shorten(wanted)}: {reason}; must have {stages} stages "
            f"between bars, E in the first, L in the last, and a t for each of the model's {model.num_layers} layers"
        )
