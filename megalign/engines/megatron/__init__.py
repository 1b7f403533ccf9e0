"""Provides the Megatron-Core engine to `engines.build`; Megatron itself is imported only when it is needed."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from megalign.config.job import JobConfig
from megalign.convert.hf.model import HFModel
from megalign.engines.megatron.check import check, check_weights, layout_problem
from megalign.engines.megatron.needs import checkpoint_bytes, rank_needs
from megalign.engines.protocol import Engine
from megalign.runtime.cpu_shims import import_megatron
from megalign.runtime.distributed import World

__all__ = [
    "build",
    "check",
    "check_weights",
    "checkpoint_bytes",
    "connect",
    "describe",
    "layout_problem",
    "rank_needs",
]
FACTORY = "megalign.engines.megatron.factory"


def _factory() -> ModuleType:
    import_megatron()
    return import_module(FACTORY)


def connect(cfg: JobConfig, world: World) -> Any:
    """Create the job's process groups; call once on every rank."""
    return _factory().connect(cfg)


def describe(cfg: JobConfig, model: HFModel, connection: Any, world: World) -> str:
    """Return the layout, and which layers compute the model where, in words."""
    text: str = _factory().describe(cfg, model, connection, world)
    return text


def build(cfg: JobConfig, model: HFModel, connection: Any, world: World, *, trainable: bool) -> Engine:
    """Build an engine whose weights are still to be loaded; `trainable` adds the optimizer."""
    engine: Engine = _factory().build(cfg, model, connection, world, trainable=trainable)
    return engine
