"""Count records kept and skipped while data are read, and decisions about their texts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from megalign.data.records import BadRecord
from megalign.schema import UserError


@dataclass
class RecordCounts:
    """Counts records read, kept, and skipped by reason, and decisions about their texts."""

    num_records: int = 0
    num_kept: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    origins: list[str] = field(default_factory=list)  # where each kept prompt was read; prompts only
    first_bad: dict[str, str] = field(default_factory=dict)  # reason -> full message of its first record
    notes: Counter[str] = field(default_factory=Counter)  # decision about texts -> number of records or texts

    def reject(self, origin: str, bad: BadRecord, *, on_bad_record: str, shared: str = "") -> None:
        """Count a bad record, or raise `UserError` if bad records stop the job."""
        message = f"{origin}: {bad}{shared}"
        if on_bad_record == "stop":
            raise UserError(message) from None
        self.bad[bad.reason] = self.bad.get(bad.reason, 0) + 1
        self.first_bad.setdefault(bad.reason, message)

    def first_problem(self) -> str:
        """Return the message of the first bad record."""
        return next(iter(self.first_bad.values()))

    def line(self) -> str:
        """Return all counts in one line for the log."""
        kept = f"{self.num_kept} of {self.num_records} records kept"
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.bad.items()))
        notes = "".join(f"; {count} {note}" for note, count in sorted(self.notes.items()))
        return (f"{kept}; skipped: {reasons}" if reasons else kept) + notes
