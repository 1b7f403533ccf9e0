"""Cuts a run's files back to the step that it goes on from, so that every step stands in them once."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megalign.files import write_whole

DUMP = re.compile(r"step_(\d+)\.jsonl")


def keep_metrics_up_to(run_dir: Path, step: int) -> list[int]:
    """Drop the metrics of steps after `step`, which a resumed run takes again, and return the numbers of these steps.

    A fresh run (`step` 0) keeps none. What is no line of metrics, such as the half-written last one of a killed run,
    is dropped, too, and so is a step that stands there already.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    kept: dict[int, str] = {}
    again: set[int] = set()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        number = _step_of(line)
        if number is None:
            continue
        if step and number <= step:
            kept.setdefault(number, line)
        else:
            again.add(number)
    write_whole(path, "".join(kept.values()))
    return sorted(again)


def _step_of(line: str) -> int | None:
    """Return the step of a line of metrics; None for anything else."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def later_dumps(run_dir: Path, step: int) -> list[Path]:
    """Return the files of dumped steps after `step`, in order."""
    folder = run_dir / "steps"
    found = ((DUMP.fullmatch(path.name), path) for path in folder.iterdir()) if folder.is_dir() else ()
    later = ((int(match[1]), path) for match, path in found if match and int(match[1]) > step)
    return [path for _, path in sorted(later)]
