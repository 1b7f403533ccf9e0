"""Reports a run on the console and in files: progress, `log.txt`, `metrics.jsonl`, trackers. Only rank 0 reports."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType

from megalign.runtime.status import explain
from megalign.schema import UserError
from megalign.train.console import ConsoleHandler, StepBar, clock, duration, evaluation_numbers, step_numbers
from megalign.train.metrics_file import MetricsFile
from megalign.train.trackers import open_tracker

LOG = logging.getLogger("megalign")
SECONDS_BETWEEN_LINES = 5.0


class Reporter:
    """Shows progress of `total` steps, as a bar on a terminal and lines elsewhere; silent unless `main`.

    between: called on every rank after each part of the work before the first step.
    """

    def __init__(
        self,
        run_dir: Path,
        total: int,
        *,
        main: bool,
        trackers: Sequence[str] = (),
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self.between = between
        self.main, self.total, self.run_dir = main, total, run_dir
        self.rounds = 0  # number of rounds of the run, if it has any
        self._metrics = MetricsFile(run_dir / "metrics.jsonl")
        self._console = Console(stderr=True)
        self._to_console = ConsoleHandler(self._console)
        # Both: a dumb terminal cannot redraw a bar, and variables such as FORCE_COLOR make a file look like a terminal.
        self._redraws = sys.stderr.isatty() and self._console.is_interactive
        self._bar = StepBar(self._console) if main and self._redraws else None
        self._last_line = 0.0
        self._phase = ""
        self._started = time.perf_counter()
        self._done_at_start = 0
        self._trackers = [open_tracker(name, run_dir) for name in trackers] if main else []

    def __enter__(self) -> Reporter:
        if self.main:
            LOG.addHandler(self._to_console)
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        with suppress(UserError):  # said when the line was written
            self.keep()
        if error is not None and self.main:
            how = "failed" if isinstance(error, Exception) else "ended"
            LOG.debug(f"{how}: {explain(error)[0]}")  # the console gets it from the code that ends the process
        LOG.removeHandler(self._to_console)
        for tracker in self._trackers:
            tracker.close()

    def phase(self, name: str, done: int, total: int) -> None:
        """Show progress of work before the first step, such as scoring the reference."""
        self._show_phase(name, done, total)
        self.between()

    def _show_phase(self, name: str, done: int, total: int) -> None:
        if not self.main:
            return
        now = time.perf_counter()
        if name != self._phase:
            self._phase, self._started = name, now
            if self._bar is not None:
                self._bar.begin(name, 0, total)
        if self._bar is not None:
            self._bar.show(done=done)
        if done == total:
            LOG.debug(f"{name}: {done}/{total} in {duration(now - self._started)}")
        self._line(f"{name}: {done}/{total}", force=done in (1, total))

    def begin(self, done: int) -> None:
        """Start counting steps; `done` of them were taken before this start."""
        for tracker in self._trackers:
            tracker.begin(done)
        self._done_at_start, self._started = done, time.perf_counter()
        if self._bar is not None:
            self._bar.begin("training", done, self.total)

    def end(self) -> None:
        """Remove the bar, so that the last lines stand alone."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def doing(self, name: str) -> None:
        """Show on the bar what the job is doing, such as sampling."""
        if self._bar is not None:
            self._bar.show(name)

    def step(self, record: Mapping[str, Any]) -> None:
        """Write one finished step's metrics to `metrics.jsonl` and trackers, and show them."""
        if not self.main:
            return
        self._write(record)
        step = record["step"]
        elapsed = time.perf_counter() - self._started
        left = clock(elapsed / max(1, step - self._done_at_start) * (self.total - step))
        numbers = step_numbers(record, rounds=self.rounds)
        if self._bar is not None:
            self._bar.show("training", step, f"left {left}", numbers)
        self.progress(f"step {step}/{self.total} {numbers} left {left}", force=step in (1, self.total))
        if any(name.startswith("eval_") for name in record):
            self._say_evaluation(record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Write the held-out evaluation before the first step as the metrics of step 0, and show it."""
        if self.main:
            self._write(record)
            self._say_evaluation(record)
            self.doing("training")

    def _write(self, record: Mapping[str, Any]) -> None:
        """Write a line of metrics with the time, and send its numbers to the trackers."""
        try:
            self._metrics.add({**_plain(record), "time": _utc_now()})
        except UserError as error:
            self.warn(f"{error}; the line is kept and written with the next one")
        for tracker in self._trackers:
            tracker.add(record)

    def keep(self) -> None:
        """Flush the metrics to disk: a checkpoint that stays must not outlive its steps' lines.

        UserError where that fails.
        """
        if self.main:
            self._metrics.keep()

    def _say_evaluation(self, record: Mapping[str, Any]) -> None:
        when = f"after step {record['step']}" if record["step"] else "before the first step"
        self.say(f"evaluation {when}: {evaluation_numbers(record)} ({duration(record['eval_seconds'])})")

    def say(self, message: str) -> None:
        """Write a line to the log and the console."""
        if self.main:
            LOG.info(message)

    def note(self, message: str) -> None:
        """Write a line to the log alone."""
        if self.main:
            LOG.debug(message)

    def warn(self, message: str) -> None:
        """Write a warning to the log and the console; `message` has the numbers."""
        if self.main:
            LOG.warning(f"warning: {message}")

    def progress(self, message: str, *, force: bool = False) -> None:
        """Write a line to the log, and to a console without a bar: always where `force`, else at most every 5 s."""
        if self.main:
            LOG.debug(message)
            self._line(message, force=force)

    def table(self, table: RenderableType, text: str) -> None:
        """Show a table on a terminal; the log and other consoles get `text`."""
        if not self.main:
            return
        if not self._redraws:
            LOG.info(text)
            return
        LOG.debug(text)
        self._console.print(table)

    def _line(self, text: str, *, force: bool) -> None:
        now = time.perf_counter()
        if self._bar is None and (force or now - self._last_line > SECONDS_BETWEEN_LINES):
            print(text, file=sys.stderr, flush=True)
            self._last_line = now


def start_log(run_dir: Path, *, main: bool) -> None:
    """Log to `log.txt` on rank 0 and nowhere on the others; a Reporter adds the console."""
    LOG.setLevel(logging.DEBUG)
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


def _utc_now() -> str:
    """Return the time in UTC in ISO 8601, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity, which JSON does not have, by null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
