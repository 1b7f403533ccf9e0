"""Count what became of records: kept, skipped and why, and what was decided about their texts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    """What became of the records: how many were read, and how many were skipped for which reason."""

    num_records: int = 0
    num_kept: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    first_bad: dict[str, str] = field(default_factory=dict)  # one full message for each reason
    notes: Counter[str] = field(default_factory=Counter)  # what was decided about texts, and of how many

    def line(self) -> str:
        """One line for a log."""
        kept = f"{self.num_kept} of {self.num_records} records kept"
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.bad.items()))
        notes = "".join(f"; {count} {note}" for note, count in sorted(self.notes.items()))
        return (f"{kept}; skipped: {reasons}" if reasons else kept) + notes
