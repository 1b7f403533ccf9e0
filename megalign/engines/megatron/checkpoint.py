"""Saves and loads a shard and its optimizer as a `torch_dist` checkpoint, which loads at any layout."""

from __future__ import annotations

import queue
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async, state_dict_saver  # noqa: F401  for the shims
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy  # noqa: F401  likewise

from megalign.convert.hf.companions import copy_hf_files
from megalign.convert.megatron.about import read_about
from megalign.convert.megatron.checkpoint_dir import HF_FILES
from megalign.convert.megatron.torch_dist import TorchDistReader
from megalign.engines.megatron.optimizer_state import fill_optimizers, load_optimizer
from megalign.engines.megatron.shard import Shard
from megalign.runtime.ranks import max_over_job

# Without a prefix, optimizer tensors have the same names however many optimizers share the parameters.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def save(shard: Shard, optimizer: Any, folder: Path, extra: dict[str, Any]) -> None:
    """Write weights, optimizer state and plain values as a `torch_dist` checkpoint, independent of the layout.

    The Hugging Face checkpoint's other files are copied beside it, so that it can be exported again.
    """
    # Megatron's own queue for writers' results starts a server process, which outlives a rank that is killed.
    filesystem_async._results_queue = queue.Queue()
    about = {
        "dtype": str(shard.options.dtype),
        "optimizer": optimizer is not None,
        "lora": None if shard.options.lora is None else asdict(shard.options.lora),
        "base": shard.options.base,
    }
    dist_checkpointing.save(
        _sharded_state(shard, optimizer, loading=False) | {"extra": extra, "about": about}, str(folder)
    )
    if dist.get_rank() == 0 and shard.source is not None:
        copy_hf_files(shard.source, folder / HF_FILES)


def load(shard: Shard, optimizer: Any, folder: Path) -> dict[str, Any]:
    """Load a checkpoint into weights and, where both have one, the optimizer; return the plain values saved with it.

    A checkpoint without adapters leaves the shard's as they are; one with adapters must have the same settings.
    """
    TorchDistReader(folder).check_objects()
    about = read_about(folder)
    adapters = about.lora
    if adapters is not None and adapters != shard.options.lora:
        raise ValueError(f"{folder} holds adapters {adapters}, the engine {shard.options.lora}")
    with_optimizer = optimizer is not None and about.optimizer
    if with_optimizer:
        # A fresh torch optimizer has no state to be loaded into; every value of it is replaced below.
        for part in optimizer.chained_optimizers:
            part._init_optimizer_states_with_dummy_values()
    wanted, kept = _sharded_state(shard, optimizer if with_optimizer else None, loading=True), {}
    for number in range(len(shard.chunks)) if adapters is None else ():
        model = wanted[f"model{number}"]
        kept[number] = {name: model.pop(name).data for name in list(model) if name.startswith("adapters.")}
    state = dist_checkpointing.load(wanted, str(folder))
    for number, chunk in enumerate(shard.chunks):
        chunk.load_state_dict(state[f"model{number}"] | kept.get(number, {}))
    if with_optimizer:
        parts = optimizer.chained_optimizers  # Megatron saves a single one as it is, several by number
        for number, part in enumerate(parts):
            load_optimizer(part, state["optimizer"] if len(parts) == 1 else state["optimizer"][number])
    elif optimizer is not None:
        optimizer.reload_model_params()
    extra: dict[str, Any] = state.get("extra", {})
    return extra


def _sharded_state(shard: Shard, optimizer: Any, *, loading: bool) -> dict[str, Any]:
    metadata = dict(METADATA)  # a copy, because Megatron adds this job's groups to it
    state: dict[str, Any] = {
        f"model{number}": chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(shard.chunks)
    }
    if optimizer is not None:
        fill_optimizers(optimizer, most=partial(max_over_job, device=shard.options.device))
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=metadata)
    return state
