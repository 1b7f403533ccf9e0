"""Define the error of a bad record: its reason, field, value and what that must be."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from megalign.schema import shorten

MISSING = object()


class BadRecord(Exception):
    """Raised for a record that is not usable; counted under `reason`, with the fault in `field`.

    kinds: a name for each fault, equal in all records with that fault; empty for faults found by tokenising.
    size: number of tokens of a sequence that is too long.
    """

    def __init__(
        self, reason: str, message: str, *, field: str = "", kinds: Collection[str] = (), size: int = 0
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field
        self.kinds = frozenset(kinds)
        self.size = size


def bad_field(field: str, value: Any, must_be: str, *, reason: str) -> BadRecord:
    """Return a `BadRecord` whose message names the field, its value and what it must be."""
    shown = "missing" if value is MISSING else shorten(value)
    return BadRecord(reason, f"field {field} is {shown}; must be {must_be}", field=field)


def join_faults(faults: Sequence[BadRecord]) -> BadRecord:
    """Return one `BadRecord` for all faults of a record; faults of one kind, such as in each response, appear once."""
    by_kind: dict[str, list[BadRecord]] = {}
    for fault in faults:
        by_kind.setdefault(f"{fault.reason}: {re.sub('[0-9]+', '', fault.field)}", []).append(fault)
    more = {kind: f" (and {len(alike) - 1} more like it)" if alike[1:] else "" for kind, alike in by_kind.items()}
    message = "; also: ".join(f"{alike[0]}{more[kind]}" for kind, alike in by_kind.items())
    return BadRecord(faults[0].reason, message, field=faults[0].field, kinds=by_kind)


def run_all(checks: Iterable[Callable[[], None]]) -> None:
    """Run every check, and raise one `BadRecord` for all the faults that they find."""
    faults = []
    for check in checks:
        try:
            check()
        except BadRecord as fault:
            faults.append(fault)
    if faults:
        raise join_faults(faults)
