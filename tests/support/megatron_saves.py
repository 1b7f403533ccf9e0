"""A checkpoint as Megatron itself saves and loads it, which is how earlier versions of megalign did."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async, state_dict_saver  # noqa: F401  for the shims
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy  # noqa: F401  likewise

from megalign.engines.megatron.checkpoint import about_shard
from megalign.engines.megatron.engine import MegatronEngine
from megalign.engines.megatron.parts import METADATA


def megatron_save(engine: MegatronEngine, folder: Path, extra: dict[str, Any]) -> None:
    """Save with Megatron; the optimizer must have taken an update, and every stage have all kinds of parameters."""
    filesystem_async._results_queue = queue.Queue()  # Megatron's own starts a server process
    about = about_shard(engine.shard, optimizer=True)
    dist_checkpointing.save(_state(engine, loading=False) | {"extra": extra, "about": about}, str(folder))


def megatron_load(engine: MegatronEngine, folder: Path) -> dict[str, Any]:
    """Load with Megatron; return the plain values saved with it."""
    parts = engine.optimizer.chained_optimizers
    for part in parts:
        part._init_optimizer_states_with_dummy_values()
    state = dist_checkpointing.load(_state(engine, loading=True), str(folder))
    for number, chunk in enumerate(engine.shard.chunks):
        chunk.load_state_dict(state[f"model{number}"])
    for number, part in enumerate(parts):
        _load_optimizer(part, state["optimizer"] if len(parts) == 1 else state["optimizer"][number])
    extra: dict[str, Any] = state["extra"]
    return extra


def _load_optimizer(part: Any, state: dict[str, Any]) -> None:
    """Load the distributed optimizer and restore AdamW's step of each parameter, which Megatron's load leaves out."""
    parameter_state = state.pop("param_state", {})
    part.load_state_dict(state)
    entries = list(part.optimizer.state.values())
    steps = [entry.pop("step", None) for entry in entries]
    part.load_parameter_state_from_fully_reshardable(parameter_state)
    for entry, step in zip(entries, steps, strict=True):
        if step is not None:
            entry["step"] = torch.tensor(float(step))


def _state(engine: MegatronEngine, *, loading: bool) -> dict[str, Any]:
    metadata = dict(METADATA)
    state: dict[str, Any] = {
        f"model{number}": chunk.sharded_state_dict(metadata=metadata)
        for number, chunk in enumerate(engine.shard.chunks)
    }
    state["optimizer"] = engine.optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=metadata)
    return state
