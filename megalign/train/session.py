"""A job's engine, as its configuration describes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megalign.config import JobConfig
from megalign.convert import HFWriter, ModelConfig, hf_parts
from megalign.convert.transfer import write_adapter
from megalign.convert.writer import HFPart, Owner, SharedFiles, model_specs
from megalign.engines.engine import Engine
from megalign.engines.groups import Groups, make_groups
from megalign.engines.megatron import AdamW, EngineOptions, MegatronEngine
from megalign.engines.scoring import Cutting
from megalign.models.gpt import choose_layers
from megalign.models.lora import Lora
from megalign.runtime.distributed import World
from megalign.runtime.quiet import missing_packages
from megalign.schema import UserError, reason_of

Result = TypeVar("Result")


class SharedError(UserError):
    """Bad input that every rank has heard of; rank 0 alone tells it."""


def gather(value: Any) -> list[Any]:
    """One object of every rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_every_rank(read: Callable[[], Result]) -> Result:
    """`read`'s result, unless any rank's call refused its input: then all ranks raise the first such refusal."""
    result, problem = None, None
    try:
        result = read()
    except UserError as error:
        problem = str(error)
    for found in gather(problem):
        if found is not None:
            raise SharedError(found)
    return result  # type: ignore[return-value]


def cutting_of(cfg: JobConfig) -> Cutting:
    return Cutting(cfg.data.tokens_per_micro_batch, cfg.data.packing)


def dtype_of(cfg: JobConfig) -> torch.dtype:
    return torch.bfloat16 if cfg.run.dtype == "bf16" else torch.float32


def temperature_of(cfg: JobConfig) -> float:
    """What divides the logits of every log-prob that is trained on."""
    return cfg.rollout.temperature if cfg.rollout is not None else 1.0


def lora_of(cfg: JobConfig) -> Lora | None:
    return None if cfg.lora is None else Lora(cfg.lora.rank, cfg.lora.alpha, tuple(cfg.lora.targets))


def groups_of(cfg: JobConfig) -> Groups:
    """The job's process groups; call once on every rank."""
    parallel = cfg.parallel
    return make_groups(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual_pipeline,
        context=parallel.context,
        expert=parallel.expert,
        timeout_s=cfg.watchdog.timeout_s,
    )


def layout_text(groups: Groups) -> str:
    """The layout in words; axes that are later additions are named where they are used."""
    text = f"tensor {groups.tensor_size} x pipeline {groups.pipeline_size}"
    text += f" (virtual {groups.virtual_size})" if groups.virtual_size > 1 else ""
    text += f" x context {groups.context_size}" if groups.context_size > 1 else ""
    text += f" x data {groups.data_size}"
    return text + (f", experts over {groups.expert_size}" if groups.expert_size > 1 else "")


def layers_of(cfg: JobConfig, model: ModelConfig, world: World) -> str:
    """The layer kind the job runs with."""
    return choose_layers(cfg.engine.layers, model, on_cuda=world.device.type == "cuda")


def layers_text(cfg: JobConfig, model: ModelConfig, world: World) -> str:
    """Which layers compute the model and where, and what Megatron would use and lacks."""
    absent = " and ".join(missing_packages())
    text = f"{layers_of(cfg, model, world)} layers on {world.device.type}"
    return f"{text} ({absent} not installed)" if absent else text


def build_engine(
    cfg: JobConfig, model: ModelConfig, groups: Groups, world: World, *, trainable: bool
) -> MegatronEngine:
    """A Megatron engine without weights yet; `trainable` adds the optimizer."""
    passed = dict(cfg.engine.megatron)
    if cfg.run.deterministic:
        passed["deterministic_mode"] = True
    options = EngineOptions(
        dtype=dtype_of(cfg),
        device=world.device,
        layers=layers_of(cfg, model, world),
        sequence_parallel=cfg.parallel.sequence,
        recompute=cfg.engine.recompute if trainable else "none",
        temperature=temperature_of(cfg),
        chunk_tokens=None if cfg.engine.chunk_tokens == "auto" else cfg.engine.chunk_tokens,
        tp_invariant=cfg.engine.tp_invariant,
        aux_loss_coefficient=cfg.model.aux_loss_coefficient if trainable else 0.0,
        lora=lora_of(cfg) if trainable else None,
        base=cfg.model.path,
        megatron=passed,
    )
    optimizer = cfg.optimizer
    adamw = AdamW(optimizer.betas, optimizer.eps, optimizer.weight_decay) if trainable else None
    return MegatronEngine(model, groups, options, adamw=adamw, seed=cfg.run.seed)


class ExportFailed(SharedError):
    """An export came to nothing, on every rank alike; the text is the reason."""


def export(
    engine: Engine,
    model: ModelConfig,
    source: Path,
    folder: Path,
    *,
    owner: Owner | None = None,
    lora: Lora | None = None,
    base: str | None = None,
) -> bool:
    """Write the live weights as a Hugging Face directory, every rank its part; called on every rank.

    `folder` must be on a file system that all ranks see. Adapters are merged; whether they also lie beside in PEFT's
    format for the model called `base`, known to rank 0. An earlier export of `owner`, or of anybody where that is
    None, is replaced. Raises ExportFailed on every rank, whichever failed.
    """
    main = dist.get_rank() == 0
    specs = model_specs(model, engine.dtype)
    writer = _or_fail(
        lambda: HFWriter(folder, source=source, specs=specs, overwrite=True, owner=owner) if main else None
    )
    try:
        shared = _or_fail(lambda: writer.share() if writer is not None else None)
        written = _write_part(engine, model, next(one for one in gather(shared) if one is not None))
        return _or_fail(lambda: _close(engine, writer, written, lora, base))
    except BaseException:
        if writer is not None:
            writer.abandon()
        raise


def _or_fail(read: Callable[[], Result]) -> Result:
    """`read`'s result, unless any rank's call failed, whatever the reason: then ExportFailed on all."""
    result, problem = None, None
    try:
        result = read()
    except Exception as error:  # of a disk, a file system, a library that writes files
        problem = str(error) if isinstance(error, UserError) else reason_of(error)
    for found in gather(problem):
        if found is not None:
            raise ExportFailed(found)
    return result  # type: ignore[return-value]


def _close(
    engine: Engine, writer: HFWriter | None, written: list[dict[str, Any]], lora: Lora | None, base: str | None
) -> bool:
    """Add the adapters and publish; ranks other than 0 only take part in gathering."""
    adapters = engine.adapter_tensors() if lora is not None else iter(())
    if writer is None:
        for _ in adapters:
            pass
        return False
    for one in written:
        writer.received(one)
    beside = lora is not None and write_adapter(writer, adapters, asdict(lora), base=base)
    writer.close()
    return beside


def _write_part(
    engine: Engine, model: ModelConfig, shared: SharedFiles
) -> list[dict[str, list[tuple[str, int | None]]]]:
    """Write this rank's part of an export; what each rank wrote. A failure is told on all, after all are through."""
    part = HFPart(shared)
    problem: Exception | None = None
    for name, full in engine.own_tensors():  # to its end: ranks wait for each other in it
        try:
            for stored, expert, tensor in hf_parts(name, full, model) if problem is None else ():
                part.add(stored, tensor, expert)
        except (UserError, OSError) as error:
            problem = error

    def finish() -> dict[str, list[tuple[str, int | None]]]:
        try:
            if problem is not None:
                raise problem
            return part.close()
        finally:
            part.abandon()

    return gather(_or_fail(finish))
