"""Builds the engine that a job's configuration names; the one place that knows every engine.

An engine is a package with the functions of `EnginePackage`, imported when a job asks for it. A new one needs a
folder and a line in ENGINES.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, cast

import torch

from megalign.config.job import JobConfig
from megalign.convert.hf.model import HFModel
from megalign.data.packing import Packing
from megalign.engines.needs import RankNeeds
from megalign.engines.protocol import Engine
from megalign.model_config import Lora
from megalign.runtime.distributed import World

ENGINES = {"megatron": "megalign.engines.megatron", "deepspeed": "megalign.engines.deepspeed"}  # engine.name: package


class EnginePackage(Protocol):
    """Declares the functions of an engine's package; those before `connect` need no process group."""

    def check_weights(self, model: HFModel) -> None:
        """Raise UserError for a checkpoint from which the engine cannot build a model."""

    def layout_problem(self, cfg: JobConfig, model: HFModel, world_size: int, *, trained: bool) -> str | None:
        """Return why a model cannot run in the job's layout, in one line; None where it can."""

    def check(self, cfg: JobConfig, model: HFModel) -> None:
        """Raise UserError for settings with which the engine cannot train the model."""

    def checkpoint_bytes(self, cfg: JobConfig, model: HFModel) -> int:
        """Return the size of a checkpoint of the job, from shapes alone."""

    def rank_needs(self, cfg: JobConfig, model: HFModel, world_size: int, *, device: str) -> list[RankNeeds]:
        """Estimate the memory of each kind of rank, from shapes alone; device: cpu or cuda."""

    def connect(self, cfg: JobConfig, world: World) -> Any:
        """Create the process groups of all the job's engines; called once on every rank."""

    def describe(self, cfg: JobConfig, model: HFModel, connection: Any, world: World) -> str:
        """Return the layout and the kind of layers in words, for the log."""

    def build(self, cfg: JobConfig, model: HFModel, connection: Any, world: World, *, trainable: bool) -> Engine:
        """Build an engine whose weights are still to be loaded; without `trainable` it only scores."""


def engine_package(cfg: JobConfig) -> EnginePackage:
    """Import the package of the job's engine."""
    return cast(EnginePackage, import_module(ENGINES[cfg.engine.name]))


def dtype_of(cfg: JobConfig) -> torch.dtype:
    """Return the dtype of weights and activations."""
    return torch.bfloat16 if cfg.run.dtype == "bf16" else torch.float32


def temperature_of(cfg: JobConfig) -> float:
    """Return the temperature: in all log-probs of training, logits are divided by it."""
    return cfg.rollout.temperature if cfg.rollout is not None else 1.0


def chunk_tokens_of(cfg: JobConfig) -> int | None:
    """Return how many tokens' logits the head holds at a time; None lets it choose."""
    return None if cfg.engine.chunk_tokens == "auto" else cfg.engine.chunk_tokens


def lora_of(cfg: JobConfig) -> Lora | None:
    """Return the adapters to train, or None where all weights train."""
    return None if cfg.lora is None else Lora(cfg.lora.rank, cfg.lora.alpha, tuple(cfg.lora.targets))


def packing_of(cfg: JobConfig) -> Packing:
    """Return how a global batch is packed into micro-batches."""
    return Packing(cfg.data.tokens_per_micro_batch, cfg.data.packing)
