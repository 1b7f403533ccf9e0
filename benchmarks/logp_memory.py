"""Measures the peak memory of one call on a CPU, by torch's allocator and by the operating system."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Value = TypeVar("Value")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Peak:
    """Peak growth in bytes: of torch's allocations without the results, and of the process's resident memory."""

    extra: int
    resident: int | None


def watch(run: Callable[[], Value], results: Callable[[], Iterable[Tensor]]) -> tuple[Value, Peak]:
    """Call `run` once; return its value and its peak memory. Tensors of `results` do not count in `extra`."""
    before = settle()
    recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _no_chatter():
        recorded.start()
    value = run()
    after = resident_bytes("VmHWM")  # before the profiler builds its tables
    with _no_chatter():
        recorded.stop()
    resident = None if before is None or after is None else after - before
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    allocations = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    moves = [(event["args"]["Addr"], event["args"]["Bytes"]) for event in allocations]
    extra = _peak(moves, {tensor.untyped_storage().data_ptr() for tensor in results()})
    return value, Peak(extra, resident)


@contextmanager
def _no_chatter() -> Iterator[None]:
    """Silence stderr inside the block: the profiler's library writes a line at each start and stop."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _peak(moves: list[tuple[int, int]], results: set[int]) -> int:
    """Return the peak of allocated bytes, without frees of older memory and without the results' own allocations."""
    made_last = {address: index for index, (address, size) in enumerate(moves) if size > 0 and address in results}
    alive: dict[int, int] = {}
    total = peak = 0
    for index, (address, size) in enumerate(moves):
        if size < 0:
            total -= alive.pop(address, 0)
        elif made_last.get(address) != index:
            alive[address] = size
            total += size
            peak = max(peak, total)
    return peak


def settle() -> int | None:
    """Release free memory, reset the kernel's peak, and return the resident size; None where not supported."""
    if not CLEAR.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5", encoding="ascii")
    return resident_bytes("VmRSS")


def resident_bytes(field: str) -> int | None:
    """Return `VmRSS` (now), `VmHWM` (peak since `settle`) or `RssAnon` of this process; None where not supported."""
    if not STATUS.exists():
        return None
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
