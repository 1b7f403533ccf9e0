"""How a job ends: one stderr line, and `status.json` for those who see only a launcher's exit code."""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from megalign.schema import UserError

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
RESULT_FILE = "MEGALIGN_RESULT_FILE"  # set by launch/torchrun.sh: a new file from which it reads the job's code
RUN_FILES = ("log.txt", "metrics.jsonl", "checkpoints", "rollout.jsonl")  # any of them: a run has had the directory
# What torch, gloo and NCCL say where another process has gone or does not answer.
PEER_GONE = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|timed? ?out|remote process|by peer|NCCL.*abort",
    re.IGNORECASE,
)
GLOO_NOISE = re.compile(r"\[\S+\.(?:cc|h):\d+\] | This is typically caused by a remote worker.*")
PATIENCE_S = 5.0  # for the rank whose failure was the first to tell of it


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
    text = GLOO_NOISE.sub("", " ".join(f"{type(cause).__name__}: {cause}".split()))
    return ": ".join(part for part in (doing, inside, text) if part), step


def is_consequence(error: BaseException) -> bool:
    """Whether a failure only says that another process has gone or does not answer."""
    cause = error.__cause__ if isinstance(error, During) and error.__cause__ is not None else error
    return isinstance(cause, RuntimeError) and PEER_GONE.search(str(cause)) is not None


@dataclass
class Ending:
    """How this process tells the job's end: the first of its ranks that fails writes `status.json`, and no other.

    Until the job has taken the run directory over, a status there is another run's, which a refusal leaves alone.
    """

    run_dir: str | None = None
    taken: bool = False
    began: float = field(default_factory=time.time)

    def take_over(self) -> None:
        """Note that the run directory is this job's and holds no earlier status; called on every rank."""
        self.taken = True

    def told_by_another(self, error: BaseException) -> bool:
        """Whether another rank has written, or writes within a few seconds, the failure that `error` follows from."""
        if not is_consequence(error):
            return False
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            if any(path.exists() for path in self._written()):
                return True
            time.sleep(0.1)
        return False

    def write(self, code: int, reason: str, step: int | None) -> None:
        """Write a failure's status unless a rank has written one, or the directory is another run's."""
        if self.run_dir is None or (not self.taken and is_of_another_run(self.run_dir)):
            write_result(code, replace=False)
            return
        with suppress(OSError, ValueError):  # what is printed and the exit code say it already
            write_status(self.run_dir, code, reason, step, replace=not self.taken and not self._told_since())

    def _told_since(self) -> bool:
        """Whether a status has been written since this process began: another rank's, which failed first."""
        status = Path(str(self.run_dir), "status.json")
        return status.exists() and status.stat().st_mtime >= self.began

    def _written(self) -> list[Path]:
        result = os.environ.get(RESULT_FILE)
        paths = [Path(result)] if result else []
        return [*paths, Path(self.run_dir, "status.json")] if self.taken and self.run_dir is not None else paths


def is_of_another_run(run_dir: str | Path) -> bool:
    """Whether a directory that this job has not taken over is a run's: it has files of one, or its status."""
    folder = Path(run_dir)
    try:
        if any((folder / name).exists() for name in RUN_FILES):
            return True
        held = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(held, dict) or held.get("step") is not None:
        return True
    return held.get("code") not in (FAILED, BAD_INPUT)  # as of ranks that did not meet, which took nothing over


def write_status(run_dir: str | Path, code: int, reason: str, step: int | None, *, replace: bool = True) -> None:
    """Put `status.json` into the run directory, whole or not at all; `step` is the last finished one, if any.

    replace: whether one that is there gives way; else the first one stays.
    """
    write_result(code, replace=replace)
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(folder / "status.json", json.dumps({"code": code, "reason": reason, "step": step}), replace=replace)


def write_result(code: int, *, replace: bool) -> None:
    """Tell the launcher the code, where one asked for it."""
    result = os.environ.get(RESULT_FILE)
    if result:
        with suppress(OSError):  # of a launcher that is gone
            _write_whole(Path(result), str(code), replace=replace)


def _write_whole(path: Path, text: str, *, replace: bool) -> None:
    """Write a line to a file that appears whole; without `replace`, one that is there stays."""
    # Ranks may write at the same time, hence a name for each process.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    if replace:
        temporary.replace(path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        with suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
            file.write(text + "\n")
    temporary.unlink()


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


def refuse(error: UserError, run_dir: str | None, *, taken: bool = False) -> int:
    """Tell of bad input: one line, and a status where the run directory is known; the exit code.

    taken: whether the job has taken the run directory over; otherwise another run's status stays.
    """
    reason = " ".join(str(error).split())
    print(f"megalign: error: {reason}", file=sys.stderr, flush=True)
    Ending(run_dir, taken).write(BAD_INPUT, reason, None)
    return BAD_INPUT


def leave(code: int) -> NoReturn:
    """End the process with `code`, whatever a module of the user's does or leaves running at exit."""
    with suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)
