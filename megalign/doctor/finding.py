"""Defines what the doctor finds, and how it names the ranks that a finding is about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megalign.runtime.ranks import by_value, span

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Says in one line what was found, and in another what to do about it.

    ok: as it should be. warn: the job runs, but slowly or with a risk. fail: the job would not start, would stop, or
    would compute other numbers.
    """

    check: str
    state: State
    found: str
    advice: str = ""


def where(ranks: Iterable[int], hosts: Sequence[str]) -> str:
    """Return ranks with their hosts in words; hosts: the host name of every rank of the job."""
    chosen = sorted(ranks)
    if len(chosen) == len(hosts) > 1:
        return f"all {len(hosts)} ranks"
    by_host: dict[str, list[int]] = {}
    for rank in chosen:
        by_host.setdefault(hosts[rank], []).append(rank)
    shown = [f"{span(held)} on {host}" for host, held in by_host.items()]
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more hosts" if len(shown) > 6 else "")


def listed(values: Sequence[Any], hosts: Sequence[str]) -> str:
    """Return every value with its ranks: `2.13.0 (ranks 0-2 on a); 2.12.0 (rank 3 on b)`."""
    return "; ".join(f"{value} ({where(ranks, hosts)})" for value, ranks in by_value(values).items())
