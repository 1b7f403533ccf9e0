"""Formats a run's numbers as lines, and shows them under a bar on a terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

# Metrics that a progress line shows beside the loss, with their names there, in this order.
SHOWN = {
    "reward": "reward",  # of an evaluation
    "reward_mean": "reward",
    "accuracy": "accuracy",
    "accuracy_strong": "accuracy_strong",
    "token_accuracy": "token_accuracy",
    "implicit_reward_margin": "margin",
}


def shown(value: float) -> str:
    """Write a number with four significant digits."""
    return f"{value:.4g}"


def counted(number: int, noun: str) -> str:
    """Write a number with its noun, which takes an s in the plural."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def clock(seconds: float) -> str:
    """Write a duration as hours:minutes:seconds."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def duration(seconds: float) -> str:
    """Write how long something took: seconds below a minute, else as a clock shows it."""
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)


def outcomes(record: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    """Yield (name, value) of the rewards and accuracies in a line of metrics; `prefix` is `eval_` or nothing."""
    for key, name in SHOWN.items():
        if isinstance(value := record.get(prefix + key), (int, float)):
            yield name, value


def step_numbers(record: Mapping[str, Any], *, rounds: int) -> str:
    """Write a finished step's numbers; `rounds` is how many the run has, if any."""
    progress = f"round {record['round']}/{rounds}" if "round" in record else f"epoch {record['epoch']:.2f}"
    parts = [f"loss {shown(record['loss'])}", f"grad_norm {shown(record['grad_norm'])}", f"lr {record['lr']:.3g}"]
    parts += [f"{name} {value:.3f}" for name, value in outcomes(record)]
    speed = f"{record['tokens_per_second']:.0f} tok/s"
    if "round_tokens_per_second" in record:
        speed += f" ({record['round_tokens_per_second']:.0f} with sampling)"
    return " ".join([progress, *parts, speed])


def evaluation_numbers(record: Mapping[str, Any]) -> str:
    """Write the held-out numbers of a line of metrics."""
    parts = [f"loss {shown(record['eval_loss'])}"] if "eval_loss" in record else []
    parts += [f"{name} {shown(value)}" for name, value in outcomes(record, "eval_")]
    return ", ".join(parts)


class StepBar(Progress):
    """Shows a bar with the newest numbers below it; both fit into 80 columns."""

    def __init__(self, console: Console) -> None:
        self.numbers = ""
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            expand=True,
        )
        self._current: TaskID | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bar, and below it the step's numbers."""
        yield self.make_tasks_table(self.tasks)
        if self.numbers:
            # Wrapped even where it is drawn again below a log line, which is printed unwrapped.
            yield Text(self.numbers, no_wrap=False, overflow="fold")

    def begin(self, name: str, done: int, total: int) -> None:
        """Start the bar of another phase in place of the one before."""
        if self._current is not None:
            self.remove_task(self._current)
        self._current = self.add_task(name, completed=done, total=total, left="")

    def show(self, name: str | None = None, done: int | None = None, left: str = "", numbers: str = "") -> None:
        """Update the bar; arguments that are not given stay as they are."""
        assert self._current is not None
        self.numbers = numbers or self.numbers
        fields: dict[str, Any] = {"left": left} if left else {}
        self.update(self._current, description=name, completed=done, **fields)


class ConsoleHandler(logging.Handler):
    """Prints log lines above a bar, if there is one; those of level DEBUG are for the file alone."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record's line, warnings in yellow."""
        style = "yellow" if record.levelno >= logging.WARNING else ""
        # Unwrapped: a path that is broken over lines cannot be copied.
        self.console.print(Text(self.format(record), style=style), soft_wrap=True)
