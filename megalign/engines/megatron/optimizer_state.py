"""Reads and fills this rank's part of Megatron's distributed optimizer, which owns a run of each parameter's values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalign.ops.transfer import to_host

WEIGHT = "param"  # of the fp32 values that the optimizer updates
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Owned:
    """Holds what this rank owns of a parameter: its values from `start` on, flattened, with the moments by name."""

    parameter: torch.nn.Parameter
    start: int
    tensors: dict[str, Tensor]  # fp32; the moments before the first update are zeros that take no memory


def owned_state(optimizer: Any) -> Iterator[Owned]:
    """Yield the weights and moments of every parameter of which this rank owns values."""
    for part in optimizer.chained_optimizers:
        for parameter in part.model_param_gbuf_map:
            held = part._get_model_param_range_map(parameter)["param"]
            main = _main(part, parameter)
            state = part.optimizer.state.get(main, {})
            zeros = torch.zeros(1).expand(main.numel())
            moments = {name: state.get(name, zeros).detach() for name in MOMENTS}
            yield Owned(parameter, held.start, {WEIGHT: main.detach(), **moments})


def _main(part: Any, parameter: torch.nn.Parameter) -> Tensor:
    """Return the fp32 values of a parameter that this rank's optimizer updates."""
    group, order = part.model_param_group_index_map[parameter]
    main: Tensor = part.optimizer.param_groups[group]["params"][order]
    return main


def num_updates(optimizer: Any, *, most: Callable[[float], float]) -> float:
    """Return the number of updates taken, on every rank; one whose stage has no such parameters has not counted.

    most: returns the maximum of a number over all ranks. AdamW of torch counts by parameter, others by group.
    """
    inner = [part.optimizer for part in optimizer.chained_optimizers]
    counted = [group for torch_optimizer in inner for group in torch_optimizer.param_groups]
    counted += [entry for torch_optimizer in inner for entry in torch_optimizer.state.values()]
    steps = [torch.as_tensor(entry["step"], dtype=torch.float32) for entry in counted if "step" in entry]
    return most(max((float(step) for step in to_host(steps)), default=0.0))


def fuse(optimizer: Any) -> None:
    """Have torch's AdamW update all parameters of a group in one kernel; call before there is any state."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups if isinstance(part.optimizer, torch.optim.AdamW) else ():
            group["fused"] = True


def begin_state(optimizer: Any, count: float) -> None:
    """Give optimizers that have no state yet moments of zero, and all of them a number of updates."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            _begin_adamw(part.optimizer, count)
            continue
        part._init_optimizer_states_with_dummy_values()
        for group in part.optimizer.param_groups:  # TransformerEngine's and Apex's count by group
            group["step"] = int(count)


def _begin_adamw(adamw: torch.optim.AdamW, count: float) -> None:
    for group in adamw.param_groups:
        for parameter in group["params"]:
            entry = adamw.state[parameter]
            # One tensor each: torch increments it in place, so a shared one would be incremented for every parameter.
            entry["step"] = torch.tensor(float(count), device=parameter.device if group["fused"] else None)
            for name in MOMENTS:
                entry.setdefault(name, torch.zeros_like(parameter))


def settings(optimizer: Any, count: float) -> dict[Any, Any]:
    """Return the optimizers' settings as Megatron's own loader expects them among a checkpoint's plain values."""
    saved = []
    for part in optimizer.chained_optimizers:
        step = count if isinstance(part.optimizer, torch.optim.AdamW) else int(count)
        groups = [
            {key: value for key, value in group.items() if key != "params"} | {"step": step, "fused": None}
            for group in part.optimizer.param_groups
        ]
        saved.append({"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"})
    return saved[0] if len(saved) == 1 else dict(enumerate(saved))


def saved_updates(common: dict[Any, Any]) -> float:
    """Return the number of updates in a checkpoint's plain values, as `settings` or Megatron wrote it."""
    held = common.get("optimizer", {})
    parts = [held] if "optimizer" in held else held.values()
    return max((float(group["step"]) for part in parts for group in part["optimizer"]["param_groups"]), default=0.0)
