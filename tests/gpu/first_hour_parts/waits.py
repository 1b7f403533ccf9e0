"""Counts the host's waits for the device by line of code, as torch's sync debug mode warns of them."""

from __future__ import annotations

import collections
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

MESSAGE = ".*called a synchronizing CUDA operation.*"
PLACES = ("/megalign/", "/megatron/core/")


def innermost() -> str:
    """Return the innermost line of this project or of Megatron on the stack."""
    for frame in reversed(traceback.extract_stack()):
        if "/tests/" not in frame.filename and any(place in frame.filename for place in PLACES):
            name = frame.filename.split("site-packages/")[-1].rpartition("/megalign/")[2]
            return f"{name}:{frame.lineno} {frame.line}"
    return "elsewhere"


class Waits:
    """Counts waits inside the engine's passes over micro-batches and outside them; the first pass of a job is free.

    What a job makes once, such as tables of its rotary embedding, is made in that pass.
    """

    def __init__(self) -> None:
        self.inside: collections.Counter[str] = collections.Counter()
        self.outside: collections.Counter[str] = collections.Counter()
        self.micro_batches = 0
        self._depth = 0
        self._counts = False

    def start(self) -> None:
        """Let torch warn of waits, and count them, for the rest of this process."""
        from megalign.engines.megatron.engine import MegatronEngine

        for name in ("forward", "backward"):
            setattr(MegatronEngine, name, self._around(name, getattr(MegatronEngine, name)))
        warnings.showwarning = self._note(warnings.showwarning)
        warnings.filterwarnings("always", message=MESSAGE)
        torch.cuda.set_sync_debug_mode("warn")

    def _note(self, show: Callable[..., Any]) -> Callable[..., None]:
        def note(message: Warning | str, *rest: Any, **more: Any) -> None:
            if "synchronizing CUDA operation" not in str(message):
                show(message, *rest, **more)
            elif not self._depth:
                self.outside[innermost()] += 1
            elif self._counts:
                self.inside[innermost()] += 1

        return note

    def _around(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(engine: Any, batches: Any, *rest: Any, **more: Any) -> Any:
            warnings.filterwarnings("always", message=MESSAGE)  # ahead of what the job itself has asked for since
            seen = engine.__dict__.setdefault("_passes_seen", set())
            if not self._depth:
                self._counts = name in seen
                self.micro_batches += len(batches) * self._counts
            self._depth += 1
            try:
                return method(engine, batches, *rest, **more)
            finally:
                self._depth -= 1
                seen.add(name)

        return run
