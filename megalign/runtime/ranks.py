"""Gathers values from every rank, raises one rank's bad input on all of them, and names ranks in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megalign.schema import UserError

Result = TypeVar("Result")

# gloo's group of all ranks where the default one is NCCL's, of the job that is joined: ranks wait for rank 0's files
# there, because NCCL ends a process whose collective takes too long, without an exception.
host_group: ContextVar[dist.ProcessGroup | None] = ContextVar("host_group", default=None)


class SharedError(UserError):
    """Reports bad input on every rank; only rank 0 prints it."""


def gather(value: Any) -> list[Any]:
    """All-gather one object from each rank; return them in rank order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=host_group.get())
    return values


def gather_on_main(value: Any) -> list[Any]:
    """Gather one object from each rank on rank 0, in rank order; return an empty list on the others."""
    values: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, values or None, group=host_group.get())
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


def barrier() -> None:
    """Wait for all ranks, on the CPU."""
    dist.barrier(group=host_group.get())


def max_over_job(value: float, *, device: torch.device) -> float:
    """Return the maximum over all ranks."""
    held = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return float(held)


def span(ranks: Iterable[int]) -> str:
    """Return ranks in words: `rank 3`, `ranks 0-3, 6`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    single = len(runs) == 1 and len(runs[0]) == 1
    return f"rank{'' if single else 's'} {shown}"


def by_value(values: Sequence[Any]) -> dict[Any, list[int]]:
    """Return {value: ranks that have it}, the most frequent value first."""
    ranks = lines_by_rank([[value] for value in values])
    return dict(sorted(ranks.items(), key=lambda item: -len(item[1])))


def lines_by_rank(answers: Sequence[Sequence[Any]]) -> dict[Any, list[int]]:
    """Return {line: ranks that brought it} from the lines of each rank."""
    ranks: dict[Any, list[int]] = {}
    for rank, lines in enumerate(answers):
        for line in lines:
            ranks.setdefault(line, []).append(rank)
    return ranks
