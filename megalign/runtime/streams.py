"""Keeps a job from ending with its console: whoever reads its output may go away, or the disk under it be full."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class LastingStream:
    """Writes to a stream as long as that takes anything, and then nowhere; in all else it is the stream."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write the text if that is possible; return its length."""
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream if that is possible."""
        with suppress(OSError, ValueError):
            self.stream.flush()


@contextmanager
def lasting(*names: str) -> Iterator[None]:
    """Make these of `stdout` and `stderr` lasting inside the block."""
    before = {name: getattr(sys, name) for name in names}
    ours = {name: LastingStream(stream) for name, stream in before.items() if stream is not None}
    for name, stream in ours.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in ours.items():
            if getattr(sys, name) is stream:
                setattr(sys, name, before[name])
