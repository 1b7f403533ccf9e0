"""A bar of bytes for tools that move checkpoints: a rich one on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

EVERY_S = 10.0  # between plain lines


class ByteBar:
    """Told the total first and then what is done, by any thread; used as a context manager."""

    def __init__(self, label: str, console: Console) -> None:
        self.label, self.console = label, console
        self.lock = threading.Lock()
        self.total = self.done = 0
        self.started = self.told = time.monotonic()
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
        """How many bytes there are."""
        self.total, self.started = total, time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, total=total)

    def wrote(self, count: int) -> None:
        """`count` bytes more are done."""
        with self.lock:
            self.done += count
            if self.bar is not None:
                self.bar.update(self.task, completed=self.done)
            elif time.monotonic() - self.told > EVERY_S:
                self.told = time.monotonic()
                left = (self.total - self.done) * (self.told - self.started) / max(self.done, 1)
                gib = f"{self.done / 2**30:.2f} of {self.total / 2**30:.2f} GiB"
                self.console.print(f"{self.label}: {gib}, left {left:.0f} s")

    def __enter__(self) -> ByteBar:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
