"""Appends the metrics of steps to `metrics.jsonl`; what a full disk refuses is kept, and written with a later line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalign.files import sync, writing


class MetricsFile:
    """Holds the lines of `path` that are still to be written; the file itself always ends with a whole line."""

    def __init__(self, path: Path) -> None:
        self.path, self.waiting = path, ""

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a line, after those that wait; UserError where they cannot be written, and go on waiting."""
        self.waiting += json.dumps(record) + "\n"
        self._write()

    def keep(self) -> None:
        """Write what waits and flush the file to disk; UserError where that fails."""
        if self.waiting:
            self._write()
        if self.path.is_file():
            with writing(self.path):
                sync(self.path)

    def _write(self) -> None:
        with writing(self.path):
            size = self.path.stat().st_size if self.path.exists() else 0
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(self.waiting)
            except OSError:
                if self.path.exists():
                    os.truncate(self.path, size)
                raise
        self.waiting = ""
