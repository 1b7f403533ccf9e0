"""Sends a run's metrics to tensorboard or wandb, besides `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Tracker:
    """Sends metrics to TensorBoard or W&B, besides `metrics.jsonl`."""

    def __init__(self, writer: Any, kind: str) -> None:
        self._writer, self._kind = writer, kind

    def add(self, record: Mapping[str, Any]) -> None:
        """Send a line of metrics; texts such as the pass mode are left out."""
        numbers = {name: value for name, value in record.items() if isinstance(value, (int, float)) and name != "step"}
        if self._kind == "wandb":
            self._writer.log(numbers, step=record["step"])
            return
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Finish writing."""
        self._writer.finish() if self._kind == "wandb" else self._writer.close()


def open_tracker(name: str, run_dir: Path) -> Tracker:
    """Start the tracker of that name for a run directory."""
    if name == "wandb":
        import wandb

        return Tracker(wandb.init(dir=str(run_dir), name=run_dir.name), name)
    from torch.utils.tensorboard import SummaryWriter

    return Tracker(SummaryWriter(str(run_dir / "tensorboard")), name)
