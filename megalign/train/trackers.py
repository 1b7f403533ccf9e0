"""Sends a run's metrics to TensorBoard or Weights & Biases, besides `metrics.jsonl`; each step stands there once."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megalign.files import write_whole

WANDB_ID = "wandb_id.txt"  # in a run directory: the id of its run at Weights & Biases


class Tracker(Protocol):
    def begin(self, done: int) -> None:
        """Start, or go on after `done` steps; what was sent of later steps is replaced."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Send a line of metrics; texts such as the pass mode are left out."""

    def close(self) -> None:
        """Finish writing."""


class TensorBoard:
    """Writes event files, of which TensorBoard shows the last one's steps where they overlap."""

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, so that a broken installation is noticed first

        self._make, self._folder = SummaryWriter, run_dir / "tensorboard"
        self._writer: Any = None

    def begin(self, done: int) -> None:
        """Start a file of events that hides what others hold of later steps."""
        self._writer = self._make(str(self._folder), purge_step=done + 1)

    def add(self, record: Mapping[str, Any]) -> None:
        """Write a line's numbers at once: a killed process must not lose steps that a checkpoint keeps."""
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """Goes on with the run that the run directory names; it takes each step once, so steps taken again are left out.

    A run that goes back to an earlier step with other settings has moved the name aside, and sends its steps anew.
    """

    def __init__(self, run_dir: Path) -> None:
        import wandb

        path = run_dir / WANDB_ID
        self._known = path.is_file()
        name = path.read_text(encoding="utf-8").strip() if self._known else secrets.token_hex(8)
        self._run_dir = run_dir
        self._run = wandb.init(dir=str(run_dir), name=run_dir.name, id=name, resume="allow")
        if not self._known:
            write_whole(path, f"{name}\n")

    def begin(self, done: int) -> None:
        """Send the steps that the run directory holds, where they were sent to no run that can go on."""
        metrics = self._run_dir / "metrics.jsonl"
        if done and not self._known and metrics.is_file():
            for line in metrics.read_text(encoding="utf-8").splitlines():
                self.add(json.loads(line))

    def add(self, record: Mapping[str, Any]) -> None:
        """Send a line's numbers, unless the step was sent before."""
        if record["step"] >= self._run.step:
            self._run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if isinstance(value, (int, float)) and name != "step"}


def open_tracker(name: str, run_dir: Path) -> Tracker:
    """Make the tracker of that name for a run directory."""
    return WeightsAndBiases(run_dir) if name == "wandb" else TensorBoard(run_dir)
