"""Describes the CUDA device, and measures times and memory where it gives any."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

CUDA = torch.device("cuda", 0)


def machine() -> dict[str, Any]:
    """Describe the device and the libraries that are compared."""
    versions = {}
    for name in ("torch", "transformers", "megatron-core", "trl", "transformer-engine", "triton"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": torch.cuda.get_device_name(0),
        "capability": list(torch.cuda.get_device_capability(0)),
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def clock_problem() -> str | None:
    """Return why nothing can be timed on the device; None where it can."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    end.record()
    end.synchronize()
    timed = isinstance(start.elapsed_time(end), float)
    return None if timed else "the device's events give no times"


def memory_problem() -> str | None:
    """Return why the device's memory cannot be measured; None where it can."""
    torch.cuda.reset_peak_memory_stats()
    held = torch.empty(1 << 20, device=CUDA)
    measured = torch.cuda.max_memory_allocated() >= held.numel()
    return None if measured else "the device tells no memory"


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the most memory that a call takes beyond what is held before it; the call's result counts."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def milliseconds(function: Callable[[], object]) -> float:
    """Return the time of a call on the device, waits of the device included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def take_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return each way's median time in milliseconds; all run once a round, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, way in ways.items():
            took = milliseconds(way)
            if number > 1:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    """Return the distance of two tensors relative to the right one, in float64."""
    found, right = found.detach().double(), right.detach().double()
    return float((found - right).norm() / right.norm().clamp(min=1e-300))
