"""What a run tells people and files: progress, log, `metrics.jsonl`, trackers. Only rank 0 tells anything."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG = logging.getLogger("megalign")
SECONDS_BETWEEN_LINES = 5.0


class Reporter:
    """Progress of `total` steps with a bar on a terminal and plain lines elsewhere; silent where `main` is False."""

    def __init__(self, run_dir: Path, total: int, *, main: bool, trackers: Sequence[str] = ()) -> None:
        self.main, self.total, self.run_dir = main, total, run_dir
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._last_line = 0.0
        self._started = time.perf_counter()
        self._done_at_start = 0
        self._trackers = [_tracker(name, run_dir) for name in trackers] if main else []

    def __enter__(self) -> Reporter:
        if self.main and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        for tracker in self._trackers:
            tracker.close()

    def phase(self, name: str, done: int, total: int) -> None:
        """Progress of what comes before the first step, such as scoring the reference."""
        if not self.main:
            return
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(name)
            self._bar.update(self._task, description=name, completed=done, total=total)
        elif done in (1, total):
            self._line(f"{name}: {done}/{total}", force=True)

    def begin(self, done: int) -> None:
        """The first step is next; `done` steps are behind it."""
        self._done_at_start, self._started = done, time.perf_counter()
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task("training", completed=done, total=self.total)

    def step(self, record: Mapping[str, Any]) -> None:
        """One finished step's metrics, to `metrics.jsonl`, trackers and the eye."""
        if not self.main:
            return
        with open(self.run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(record)) + "\n")
        for tracker in self._trackers:
            tracker.add(record)
        step = record["step"]
        shown = f"loss {record['loss']:.4g}"
        if "reward_mean" in record:
            shown += f" reward {record['reward_mean']:.3f}"
        shown += f" {record['tokens_per_second']:.0f} tok/s"
        if self._bar is not None:
            self._bar.update(self._task, description=shown, completed=step)
        elapsed = time.perf_counter() - self._started
        left = elapsed / max(1, step - self._done_at_start) * (self.total - step)
        self._line(f"step {step}/{self.total} {shown} left {left:.0f}s", force=step in (1, self.total))

    def say(self, message: str) -> None:
        """A line to the log and the terminal."""
        if self.main:
            LOG.info(message)

    def _line(self, text: str, *, force: bool) -> None:
        now = time.perf_counter()
        if self._bar is None and (force or now - self._last_line > SECONDS_BETWEEN_LINES):
            print(text, file=sys.stderr, flush=True)
            self._last_line = now


def start_log(run_dir: Path, *, main: bool) -> None:
    """Log to `log.txt` and stderr on rank 0, nowhere on the others."""
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    for handler in list(LOG.handlers):
        LOG.removeHandler(handler)
        handler.close()
    if not main:
        LOG.addHandler(logging.NullHandler())
        return
    to_file = logging.FileHandler(run_dir / "log.txt", encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    LOG.addHandler(to_file)
    LOG.addHandler(logging.StreamHandler(sys.stderr))


def keep_metrics_up_to(run_dir: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will take again; all of them for a fresh run.

    So is a line that a killed run left half written.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    partial = path.with_name(".metrics.partial")
    partial.write_text("".join(line for line in whole if json.loads(line)["step"] <= step), encoding="utf-8")
    partial.replace(path)


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN or infinity: null stands for them."""
    return {
        name: None if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))) else value
        for name, value in record.items()
    }


class _Tracker:
    """One destination of metrics besides the file."""

    def __init__(self, writer: Any, kind: str) -> None:
        self._writer, self._kind = writer, kind

    def add(self, record: Mapping[str, Any]) -> None:
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        if self._kind == "wandb":
            self._writer.log(numbers, step=record["step"])
            return
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.finish() if self._kind == "wandb" else self._writer.close()


def _tracker(name: str, run_dir: Path) -> _Tracker:
    if name == "wandb":
        import wandb

        return _Tracker(wandb.init(dir=str(run_dir), name=run_dir.name), name)
    from torch.utils.tensorboard import SummaryWriter

    return _Tracker(SummaryWriter(str(run_dir / "tensorboard")), name)
