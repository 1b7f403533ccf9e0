"""Reads how transformers splits the layers of a model over tensor ranks, and says where that is not exact here.

A plan lists linear layers split by rows of the weight ("colwise") or by columns ("rowwise"). Between the two, each rank
has its own heads or features, so any other parameter there gets only a part of its gradient.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from megalign.convert.hf.auto_model import decoder_of

COLUMN, ROW, SUMMED = "colwise", "rowwise", "replicated_with_grad_allreduce"
STYLES = (COLUMN, ROW, SUMMED)


def planned(model: Any) -> dict[str, str]:
    """Return {name of a module or parameter in the decoder: style}; empty where transformers has no plan."""
    plan: dict[str, str] = getattr(model.config, "base_model_tp_plan", None) or {}
    decoder = decoder_of(model)
    names = [name for name, _ in (*decoder.named_modules(), *decoder.named_parameters())]
    patterns = {re.compile(key.replace(".", r"\.").replace("*", r"\d+")): style for key, style in plan.items()}
    return {name: style for name in names for pattern, style in patterns.items() if pattern.fullmatch(name) is not None}


def plan_problem(model: Any, size: int) -> str | None:
    """Return why a model cannot be split over `size` tensor ranks, as the middle of an error; None if it can."""
    kind, plan = type(model).__name__, planned(model)
    if not plan:
        return f"transformers has no tensor-parallel plan for {kind}"
    styles = set(model.config.base_model_tp_plan.values()) - set(STYLES)
    if styles:
        return f"transformers' tensor-parallel plan for {kind} has {min(styles)}, which is not implemented here"
    modules = dict(decoder_of(model).named_modules())
    for name, style in plan.items():
        if style == SUMMED:
            continue
        layer = modules.get(name)
        if type(layer) is not nn.Linear:
            return f"{name} of {kind} is no linear layer, although transformers' tensor-parallel plan splits it"
        width = layer.out_features if style == COLUMN else layer.in_features
        if width % size:
            return f"it does not divide the {width} {'rows' if style == COLUMN else 'columns'} of {name}"
    between = next(_between(model, plan), None)
    if between is not None:
        return f"every rank would have a part of the gradient of {between} of {kind}"
    return None


def _between(model: Any, plan: dict[str, str]) -> Iterator[str]:
    """Yield the parameters between split layers whose gradient the plan does not sum."""
    parents = {name.rpartition(".")[0] for name, style in plan.items() if style != SUMMED}
    for name, _ in decoder_of(model).named_parameters():
        if any(f"{name}.".startswith(f"{each}.") for each in plan):
            continue
        if any(name.startswith(f"{parent}.") for parent in parents):
            yield name
