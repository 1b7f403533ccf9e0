"""Summarises a finished run: first, best and last evaluation, steps, time, and where its results are."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megalign.config.job import JobConfig
from megalign.runtime.command_line import program
from megalign.train.console import SHOWN, counted, duration, shown
from megalign.train.reporter import Reporter
from megalign.train.resume_point import latest

Line = Mapping[str, Any]
Row = tuple[str, Line, str]  # name, line of metrics, prefix of its metrics


def report_summary(report: Reporter, cfg: JobConfig, *, step: int, begun_at: int, seconds: float) -> None:
    """Report a finished run's summary table, its time, and where model and checkpoints are.

    step: finished steps. begun_at: those before this start. seconds: time since this start.
    """
    if not report.main:
        return
    report.end()
    lines = read_metrics(report.run_dir)
    if rows := summary_rows(lines):
        title = f"{cfg.loss.name}, {report.run_dir}"
        plain = as_text(summary_table(rows, title=None))
        report.table(summary_table(rows, title=title), f"summary of {title}\n{plain}")
    report.say(time_line(lines, step=step, begun_at=begun_at, seconds=seconds))
    newest = latest(report.run_dir / "checkpoints")
    model = cfg.export.hf_dir
    if model is None:
        how = "" if newest is None else f"; {program()} export {newest} OUT_HF_DIR writes it"
        model = f"not exported, since export.hf_dir is none{how}"
    report.say(f"model: {model}")
    report.say(f"checkpoints: {'none' if newest is None else newest}")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read every line of a run's metrics, those from before a resume included."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def best_evaluation(lines: Sequence[Line]) -> tuple[Line | None, str]:
    """Return the evaluation with the highest reward (rounds) or the lowest loss, and which of the two that is."""
    for key, sign, why in (("eval_reward", -1.0, "highest reward"), ("eval_loss", 1.0, "lowest loss")):
        having = [line for line in lines if line.get(key) is not None]
        if having:
            return min(having, key=lambda line: sign * float(line[key])), why
    return None, ""


def summary_rows(lines: Sequence[Line]) -> list[Row]:
    """Return the rows of the table: first, best and last evaluation, first and last training step."""
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if any(name.startswith("eval_") for name in line)]
    best, why = best_evaluation(evaluations)
    rows: list[Row] = []
    if evaluations:
        rows.append(("first evaluation", evaluations[0], "eval_"))
        rows += [] if best is None else [(f"best evaluation ({why})", best, "eval_")]
        rows.append(("last evaluation", evaluations[-1], "eval_"))
    if steps:
        rows += [("first training step", steps[0], ""), ("last training step", steps[-1], "")]
    return rows


def summary_table(rows: Sequence[Row], *, title: str | None) -> Table:
    """Build the table, with a column for each number that some row has; without a title it has no lines either."""
    keys = {"loss": ["loss"]}
    for key, name in SHOWN.items():
        keys.setdefault(name, []).append(key)
    table = Table(title=title) if title is not None else Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("step", justify="right")
    cells = {
        name: [
            next((line[prefix + key] for key in own if line.get(prefix + key) is not None), None)
            for _, line, prefix in rows
        ]
        for name, own in keys.items()
    }
    names = [name for name, column in cells.items() if any(value is not None for value in column)]
    for name in names:
        table.add_column(name, justify="right")
    for index, (label, line, _) in enumerate(rows):
        values = [cells[name][index] for name in names]
        table.add_row(label, str(line["step"]), *("-" if value is None else shown(value) for value in values))
    return table


def as_text(table: Table) -> str:
    """Format the table as plain text, independent of the console."""
    console = Console(file=io.StringIO(), width=200, color_system=None, force_terminal=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip("\n").splitlines())


def time_line(lines: Sequence[Line], *, step: int, begun_at: int, seconds: float) -> str:
    """Describe in a line the steps taken, their time, and the parts of it: sampling, scoring, steps, evaluation."""
    mine = [line for line in lines if line["step"] > begun_at or begun_at == 0]

    def total(name: str) -> float:
        return sum(line.get(name) or 0.0 for line in mine)

    trained = total("seconds")
    clocks = {
        "sampling": total("sampling_seconds"),
        "scoring": total("scoring_seconds"),
        "training steps": trained,
        "evaluation": total("eval_seconds"),
    }
    parts = ", ".join(f"{name} {duration(spent)}" for name, spent in clocks.items() if spent)
    steps = (
        counted(step, "step") if begun_at == 0 else f"{counted(step, 'step')}, {step - begun_at} of them in this start,"
    )
    speed = f"; {total('tokens') / trained:.0f} tokens/s in training steps" if trained else ""
    return f"{steps} in {duration(seconds)}" + (f" ({parts})" if parts else "") + speed
