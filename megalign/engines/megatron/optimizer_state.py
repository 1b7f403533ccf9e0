"""Adapts the state of torch's AdamW to the way Megatron saves and loads its distributed optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NO_PARAMETERS: Any = "no parameters on this rank"  # stands in for a parameter as key of the state; torch allows any key


def load_optimizer(part: Any, state: dict[str, Any]) -> None:
    """Load the distributed optimizer and restore AdamW's step of each parameter, which Megatron's load leaves out."""
    parameter_state = state.pop("param_state", {})  # absent on a rank without parameters
    groups = part.optimizer.param_groups
    kept = [{key: group[key] for key in ("weight_decay", "betas", "eps") if key in group} for group in groups]
    part.load_state_dict(state)
    entries = list(part.optimizer.state.values())
    steps = [entry.pop("step", None) for entry in entries]
    part.load_parameter_state_from_fully_reshardable(parameter_state)
    for entry, step in zip(entries, steps, strict=True):
        if step is not None:
            # One tensor each: torch increments it in place, so a shared one would be incremented for every parameter.
            entry["step"] = torch.tensor(float(step))
    for group, settings in zip(part.optimizer.param_groups, kept, strict=True):
        group.update(settings)  # this run's configuration, not the saved one's


def fill_optimizers(optimizer: Any, *, most: Callable[[float], float]) -> None:
    """Initialise optimizers that have no state yet, so that Megatron can read a step count from each of them.

    AdamW has no state before its first step, and never on a pipeline stage without such parameters (an expert optimizer
    where no layer has experts). The latter takes the other stages' count, because a checkpoint keeps the first rank's.
    most: returns the maximum of a number over all ranks.
    """
    inner = [part.optimizer for part in optimizer.chained_optimizers]
    groups = [group for torch_optimizer in inner for group in torch_optimizer.param_groups]
    states = [torch_optimizer.state for torch_optimizer in inner]
    entries = [entry for state in states for key, entry in state.items() if isinstance(key, torch.Tensor)]
    count = most(max((float(counted["step"]) for counted in (*groups, *entries) if "step" in counted), default=0.0))
    for torch_optimizer in inner:
        if isinstance(torch_optimizer, torch.optim.AdamW):
            _fill_adamw(torch_optimizer, count)
            continue
        for group in torch_optimizer.param_groups:  # TransformerEngine's and Apex's count by group
            if count and not group["params"]:
                group["step"] = int(count)


def _fill_adamw(adamw: torch.optim.AdamW, count: float) -> None:
    parameters = [parameter for group in adamw.param_groups for parameter in group["params"]]
    if not parameters:
        adamw.state[NO_PARAMETERS] = {"step": torch.tensor(count)}
    for parameter in parameters:
        if not adamw.state[parameter]:
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adamw.state[parameter] = {"step": torch.tensor(0.0), **zeros}
