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


def stoppable(main: Callable[[], int], *, afterwards: str = "") -> int:
    """`guarded` for a tool: files that cannot be used are bad input too, and a signal is one line and code 75.

    afterwards: what the line says that the same command will do.
    """
    signals = (signal.SIGINT, signal.SIGTERM)

    def interrupt(*_: object) -> None:
        for one in signals:  # the first ends the job; what is cleaned up then must not be cut short
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    def watched() -> int:
        try:
            return main()
        except OSError as error:
            if error.filename is None:
                raise
            raise UserError(f"{error.filename}: {error.strerror}") from None

    before = [signal.signal(one, interrupt) for one in signals]
    try:
        return guarded(watched)
    except KeyboardInterrupt:
        print(f"megalign: stopped by a signal{afterwards}", file=sys.stderr, flush=True)
        return STOPPED
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)


def refuse(error: UserError, run_dir: str | None) -> int:
    """Tell of bad input: one line, and a status where the run directory is known; the exit code."""
    reason = " ".join(str(error).split())
    print(f"megalign: error: {reason}", file=sys.stderr, flush=True)
    if run_dir is not None:
        with suppress(OSError):  # the line above and the code say it already
            write_status(run_dir, BAD_INPUT, reason, None)
    return BAD_INPUT
