"""Gathers values from every rank, and raises one rank's bad input on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megalign.schema import UserError

Result = TypeVar("Result")


class SharedError(UserError):
    """Reports bad input on every rank; only rank 0 prints it."""


def gather(value: Any) -> list[Any]:
    """All-gather one object from each rank; return them in rank order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_every_rank(read: Callable[[], Result]) -> Result:
    """Return `read()`; if it raised UserError on any rank, raise the first rank's as SharedError on all of them."""
    result, problem = None, None
    try:
        result = read()
    except UserError as error:
        problem = str(error)
    for reason in gather(problem):
        if reason is not None:
            raise SharedError(reason)
    return result  # type: ignore[return-value]


def max_over_job(value: float, *, device: torch.device) -> float:
    """Return the maximum over all ranks."""
    held = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return float(held)
