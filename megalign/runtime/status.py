"""How a job ends: one stderr line for bad input, and `status.json` for those who see only a launcher's exit code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from megalign.schema import UserError

DONE, BAD_INPUT, STOPPED = 0, 2, 75


def write_status(run_dir: str | Path, code: int, reason: str, step: int | None) -> None:
    """Put `status.json` into the run directory, whole or not at all; `step` is the last finished one, if any."""
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    # Ranks may refuse the same input at the same time, hence a name for each process.
    temporary = folder / f".status.{os.getpid()}.json"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"code": code, "reason": reason, "step": step}, file)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / "status.json")


def guarded(main: Callable[[], int], run_dir_hint: Callable[[], str | None] = lambda: None) -> int:
    """`main`'s exit code; bad input is one line on stderr, code 2 and a status in the hinted directory."""
    try:
        return main()
    except UserError as error:
        reason = " ".join(str(error).split())
        print(f"megalign: error: {reason}", file=sys.stderr)
        run_dir = run_dir_hint()
        if run_dir is not None:
            try:
                write_status(run_dir, BAD_INPUT, reason, None)
            except OSError as problem:  # the line above and the code still say it
                print(f"megalign: {run_dir}/status.json cannot be written: {problem.strerror}", file=sys.stderr)
        return BAD_INPUT
