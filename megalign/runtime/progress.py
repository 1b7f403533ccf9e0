"""Shows the progress of tools that move checkpoints, in bytes: as a bar on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import threading
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

EVERY_S = 10.0  # between plain lines


class ByteBar:
    """Shows how many of `total` bytes are written; a context manager, updated from any thread."""

    def __init__(self, label: str, console: Console) -> None:
        self.label, self.console = label, console
        self.lock = threading.Lock()
        self.total = self.done = 0
        self.started = self.shown_at = time.monotonic()
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task(label, total=None)

    def begin(self, total: int) -> None:
        """Set the total number of bytes."""
        self.total, self.started = total, time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, total=total)

    def wrote(self, count: int) -> None:
        """Add `count` bytes to those written."""
        with self.lock:
            self.done += count
            if self.bar is not None:
                self.bar.update(self.task, completed=self.done)
            elif time.monotonic() - self.shown_at > EVERY_S:
                self.shown_at = time.monotonic()
                left = (self.total - self.done) * (self.shown_at - self.started) / max(self.done, 1)
                gib = f"{self.done / 2**30:.2f} of {self.total / 2**30:.2f} GiB"
                self.console.print(f"{self.label}: {gib}, left {left:.0f} s")

    def __enter__(self) -> ByteBar:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
