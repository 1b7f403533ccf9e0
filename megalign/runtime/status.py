"""How a job ends: one stderr line, and `status.json` for those who see only a launcher's exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megalign.schema import UserError

DONE, BAD_INPUT, STOPPED = 0, 2, 75


class During(Exception):
    """A failure with what the job was doing; `step` is the last finished one, if any, and the cause is the failure."""

    def __init__(self, doing: str, step: int | None) -> None:
        super().__init__(doing)
        self.doing, self.step = doing, step


@contextmanager
def during(doing: str, step: int | None) -> Iterator[None]:
    """Say of every failure inside what the job was doing; bad input explains itself."""
    try:
        yield
    except (UserError, During):
        raise
    except Exception as error:
        raise During(doing, step) from error


def explain(error: BaseException) -> tuple[str, int | None]:
    """(one line, last finished step): what the job was doing, the collective that failed where it was one, and why."""
    doing, step = (error.doing, error.step) if isinstance(error, During) else ("", None)
    cause = error.__cause__ if isinstance(error, During) and error.__cause__ is not None else error
    frames = traceback.extract_tb(cause.__traceback__)
    calls = [frame.name for frame in frames if Path(frame.filename).name == "distributed_c10d.py"]
    ours = [frame.name for frame in frames if "megalign" in Path(frame.filename).parts]
    inside = f"{calls[-1]} of {ours[-1]}" if calls and ours else ""
    text = " ".join(f"{type(cause).__name__}: {cause}".split())
    return ": ".join(part for part in (doing, inside, text) if part), step


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
        return refuse(error, run_dir_hint())


def resumable(main: Callable[[], int]) -> int:
    """`guarded` for what goes on where it was: ended by SIGINT or SIGTERM it says so in a line, code 75."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        return guarded(main)
    except KeyboardInterrupt:
        print("megalign: stopped by a signal; the same command goes on where it was", file=sys.stderr, flush=True)
        return STOPPED
    finally:
        signal.signal(signal.SIGTERM, before)


def refuse(error: UserError, run_dir: str | None) -> int:
    """Tell of bad input: one line, and a status where the run directory is known; the exit code."""
    reason = " ".join(str(error).split())
    print(f"megalign: error: {reason}", file=sys.stderr, flush=True)
    if run_dir is not None:
        with suppress(OSError):  # the line above and the code say it already
            write_status(run_dir, BAD_INPUT, reason, None)
    return BAD_INPUT
