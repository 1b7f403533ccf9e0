"""Collects what a part of the first hour found, and writes it down after every check."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXPECTED, FAILED, SKIPPED = "as expected", "not as expected", "skipped"


class Skip(Exception):
    """Says why a part cannot be checked here."""


@dataclass
class Report:
    """Holds a part's checks and figures; `small` asks for tiny sizes."""

    path: Path
    small: bool = False
    checks: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] | None = None
    skipped: str | None = None
    error: str | None = None
    done: bool = False

    def check(self, name: str, holds: bool, *, expected: str, found: object) -> None:
        """Note a check and whether it holds."""
        self._add(name, EXPECTED if holds else FAILED, expected, found)

    def within(self, name: str, value: float, limit: float) -> None:
        """Note a number that must not be above a limit; nan is."""
        self._add(name, EXPECTED if value <= limit else FAILED, f"at most {limit:.3g}", f"{value:.3g}")

    def skip(self, name: str, reason: str) -> None:
        """Note a check that cannot be made here."""
        self._add(name, SKIPPED, "", reason)

    def figure(self, name: str, value: object) -> None:
        """Note a measured value that nothing depends on."""
        self.figures[name] = value
        self.write()

    def _add(self, name: str, verdict: str, expected: str, found: object) -> None:
        self.checks.append({"name": name, "verdict": verdict, "expected": expected, "found": str(found)})
        self.write()

    def write(self) -> None:
        """Write all of it; a part that dies later leaves it."""
        names = ("machine", "checks", "figures", "skipped", "error", "done")
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({name: getattr(self, name) for name in names}), encoding="utf-8")
        os.replace(partial, self.path)
