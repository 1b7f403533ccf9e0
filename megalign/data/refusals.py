"""Refuse a record with the reason, the field, its value and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from megalign.schema import shorten

MISSING = object()


class BadRecord(Exception):
    """Refusal of one record; the report counts it under `reason`, and `field` is where the fault lies.

    kinds: a name for each fault, the same in every record with that fault; empty for what tokenising finds.
    size: tokens of what is too long.
    """

    def __init__(
        self, reason: str, message: str, *, field: str = "", kinds: Collection[str] = (), size: int = 0
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field
        self.kinds = frozenset(kinds)
        self.size = size


def refuse(field: str, value: Any, allowed: str, *, reason: str) -> BadRecord:
    """Make a refusal that tells the field, its value and what is allowed."""
    shown = "missing" if value is MISSING else shorten(value)
    return BadRecord(reason, f"field {field} is {shown}; allowed: {allowed}", field=field)


def joined(faults: Sequence[BadRecord]) -> BadRecord:
    """Join all faults of a record into one refusal; faults of one kind, such as of each response, appear once."""
    by_kind: dict[str, list[BadRecord]] = {}
    for fault in faults:
        by_kind.setdefault(f"{fault.reason}: {re.sub('[0-9]+', '', fault.field)}", []).append(fault)
    more = {kind: f" (and {len(alike) - 1} more like it)" if alike[1:] else "" for kind, alike in by_kind.items()}
    message = "; also: ".join(f"{alike[0]}{more[kind]}" for kind, alike in by_kind.items())
    return BadRecord(faults[0].reason, message, field=faults[0].field, kinds=by_kind)


def run_all(checks: Iterable[Callable[[], None]]) -> None:
    """Run every check, and raise one refusal for all the faults that they find."""
    faults = []
    for check in checks:
        try:
            check()
        except BadRecord as fault:
            faults.append(fault)
    if faults:
        raise joined(faults)
