"""Reports how a job ends: a line on stderr, and `status.json` for those who see only a launcher's exit code."""

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
from typing import NoReturn, Protocol

from megalign.files import write_whole
from megalign.runtime.exit_codes import BAD_INPUT, DONE, FAILED, STOPPED
from megalign.runtime.heart import Counts, Heart
from megalign.runtime.stop import Stop, StoppedEarly
from megalign.runtime.streams import LastingStream, lasting
from megalign.schema import UserError

RESULT_FILE = "MEGALIGN_RESULT_FILE"  # set by the command launch: a new file from which it reads the job's code
# Any of them shows that a run has used the directory.
RUN_FILES = ("log.txt", "metrics.jsonl", "checkpoints", "rollout.jsonl")
# Messages of torch, gloo and NCCL when another process has gone or does not answer.
PEER_GONE = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|timed? ?out|remote process|by peer|NCCL.*abort",
    re.IGNORECASE,
)
# A status in which a rank reports no more than that: `explain` names the kinds of errors that torch raises for it.
CONSEQUENCE = re.compile(rf"(?:RuntimeError|Dist\w*Error): .*(?:{PEER_GONE.pattern})", re.IGNORECASE)
GLOO_NOISE = re.compile(r"\[\S+\.(?:cc|h):\d+\] | This is typically caused by a remote worker.*")
PATIENCE_S = 5.0  # to wait for the status of the rank that failed first


class PhaseError(Exception):
    """Names the phase of the job in which its cause was raised; `step` is the last finished one, if any."""

    def __init__(self, doing: str, step: int | None) -> None:
        super().__init__(doing)
        self.doing, self.step = doing, step


@contextmanager
def during(doing: str, step: int | None) -> Iterator[None]:
    """Raise PhaseError from any exception inside; UserError, which explains itself, gets the phase after a step."""
    try:
        yield
    except (PhaseError, StoppedEarly):
        raise
    except UserError as error:
        if step and error.step is None:
            error.doing, error.step = doing, step
        raise
    except BaseException as error:  # code of the user's may exit, or raise KeyboardInterrupt
        raise PhaseError(doing, step) from error


def explain(error: BaseException) -> tuple[str, int | None]:
    """Return (one line, last finished step): the phase, the collective if one failed, and the error."""
    doing, step = (error.doing, error.step) if isinstance(error, PhaseError) else ("", None)
    cause = _cause(error)
    frames = traceback.extract_tb(cause.__traceback__)
    calls = [frame.name for frame in frames if Path(frame.filename).name == "distributed_c10d.py"]
    calls = [name for name in calls if not name.startswith("_")] or calls
    ours = [frame.name for frame in frames if "megalign" in Path(frame.filename).parts and frame.name.isidentifier()]
    inside = f"{calls[-1]} of {ours[-1]}" if calls and ours else ""
    text = GLOO_NOISE.sub("", " ".join(f"{type(cause).__name__}: {cause}".split()))
    return ": ".join(part for part in (doing, inside, text) if part), step


def _cause(error: BaseException) -> BaseException:
    """Return the error that a PhaseError stands for, or another error itself."""
    return error.__cause__ if isinstance(error, PhaseError) and error.__cause__ is not None else error


def is_consequence(error: BaseException) -> bool:
    """Return whether a failure only says that another process has gone or does not answer."""
    cause = _cause(error)
    return isinstance(cause, RuntimeError) and PEER_GONE.search(str(cause)) is not None


class Watch(Protocol):
    """Declares what an ending needs of a `runtime.watchdog.Watchdog`, whose module imports torch."""

    def report_in(self, run_dir: Path) -> None:
        """Write reports into the run directory from now on."""

    def missing(self) -> str:
        """Return which other rank has ended without a word; "" where all are there."""

    def silent(self) -> str:
        """Return which other rank gives no sign of life for a few intervals; "" where all do."""

    def await_end(self) -> None:
        """Wait for the end of the process if the watchdog is about to end it."""

    def leave(self) -> None:
        """Stop watching without a word to the others, which learn that this rank has ended."""

    def close(self) -> None:
        """Say that this rank ends by itself, and stop watching."""


@dataclass
class Ending:
    """Reports this process's failure: the first rank that fails writes `status.json`, and no other.

    One that only lost its connection to another may be the first to notice; the rank that failed replaces its status.
    Until `take_over`, a status in the run directory is another run's, which a refusal must not replace.
    """

    run_dir: str | None = None
    taken: bool = False
    began: float = field(default_factory=time.time)
    stop: Stop = field(default_factory=Stop)
    heart: Heart = field(default_factory=Heart)
    watchdog: Watch | None = None

    def take_over(self) -> None:
        """Note that the run directory is this job's and holds no earlier status; called on every rank."""
        self.taken = True
        if self.watchdog is not None and self.run_dir is not None:
            self.watchdog.report_in(Path(self.run_dir))

    def reported_by_another(self, error: BaseException) -> bool:
        """Wait a few seconds for another rank to write the failure that caused `error`; return whether it did."""
        if not is_consequence(error):
            return False
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            # Before the look for a status, which a rank writes before it ends.
            ended = self.watchdog is not None and self.watchdog.missing()
            if any(path.exists() for path in self._written()):
                return True
            if ended:
                break
            time.sleep(0.1)
        return False

    @contextmanager
    def during(self, doing: str, step: int | None, *, counts: Counts = "beats") -> Iterator[None]:
        """Name the phase inside the block to the watchdog, and to who reads of an error in it, as `during` does."""
        with self.heart.during(doing, step, counts=counts), during(doing, step):
            yield

    def missing(self) -> str:
        """Return which other rank has ended without a word, or gives no sign of life; "" where that is not known."""
        return "" if self.watchdog is None else self.watchdog.missing() or self.watchdog.silent()

    def write(self, code: int, reason: str, step: int | None) -> None:
        """Write a failure's status unless a rank has written one, or the directory is another run's."""
        if self.run_dir is None or (not self.taken and is_of_another_run(self.run_dir)):
            write_result(code, replace=False)
            return
        with suppress(OSError, ValueError):  # the printed line and the exit code report it anyway
            replace = self._holds_consequence(reason) if self.taken else not self._reported_since()
            write_status(self.run_dir, code, reason, step, replace=replace)

    def _reported_since(self) -> bool:
        """Return whether a status has been written since this process began: another rank's, which failed first."""
        status = Path(str(self.run_dir), "status.json")
        return status.exists() and status.stat().st_mtime >= self.began

    def _holds_consequence(self, reason: str) -> bool:
        """Return whether the status there only follows from another failure, as `reason` does not."""
        try:
            held = json.loads(Path(str(self.run_dir), "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return CONSEQUENCE.search(str(held.get("reason"))) is not None and CONSEQUENCE.search(reason) is None

    def _written(self) -> list[Path]:
        result = os.environ.get(RESULT_FILE)
        paths = [Path(result)] if result else []
        return [*paths, Path(self.run_dir, "status.json")] if self.taken and self.run_dir is not None else paths


def is_of_another_run(run_dir: str | Path) -> bool:
    """Return whether a directory that this job has not taken over holds files or the status of a run."""
    folder = Path(run_dir)
    try:
        if any((folder / name).exists() for name in RUN_FILES):
            return True
        held = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(held, dict) or held.get("step") is not None:
        return True
    # Ranks that could not connect and took nothing over write one of these codes.
    return held.get("code") not in (FAILED, BAD_INPUT)


def write_status(run_dir: str | Path, code: int, reason: str, step: int | None, *, replace: bool = True) -> None:
    """Write `status.json` into the run directory, atomically; `step` is the last finished one, if any.

    replace: whether to replace an existing one.
    """
    write_result(code, replace=replace)
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    status = json.dumps({"code": code, "reason": reason, "step": step})
    write_whole(folder / "status.json", f"{status}\n", replace=replace)


def write_result(code: int, *, replace: bool) -> None:
    """Write the exit code to the file in RESULT_FILE, from which the launcher reads it, if that is set."""
    result = os.environ.get(RESULT_FILE)
    if result:
        with suppress(OSError):  # the launcher may be gone
            write_whole(Path(result), f"{code}\n", replace=replace)


def guarded(main: Callable[[], int], run_dir_hint: Callable[[], str | None] = lambda: None) -> int:
    """Return `main()`; on UserError print one line, write a status in the hinted directory and return 2.

    A reader of the output that has seen enough, such as `head`, ends a tool without a word; a job outlives it.
    """
    with lasting("stderr"):
        try:
            return main()
        except BrokenPipeError:
            if isinstance(sys.stdout, LastingStream):  # a job's, so that another pipe broke
                raise
            return DONE
        except UserError as error:
            return refuse(error, run_dir_hint())


def stoppable(main: Callable[[], int], *, afterwards: str = "") -> int:
    """Run a tool's `main`: UserError and unusable files are one line and code 2, a signal one line and code 75.

    afterwards: appended to the line of a signal; says what the same command will do.
    """
    signals = (signal.SIGINT, signal.SIGTERM)

    def interrupt(*_: object) -> None:
        for number in signals:  # a second signal must not interrupt the clean-up that follows the first
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    def watched() -> int:
        try:
            return main()
        except OSError as error:
            if error.filename is None:  # a pipe that is gone, for example
                raise
            raise UserError(f"{error.filename}: {error.strerror}") from None

    before = [signal.signal(number, interrupt) for number in signals]
    try:
        return guarded(watched)
    except KeyboardInterrupt:
        print(f"megalign: stopped by a signal{afterwards}", file=sys.stderr, flush=True)
        return STOPPED
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def refuse(error: UserError, run_dir: str | None, *, taken: bool = False) -> int:
    """Print a UserError in one line, write a status where the run directory is known, and return the exit code.

    taken: whether the job has taken the run directory over; otherwise another run's status stays.
    """
    reason, code = " ".join(str(error).split()), code_of(error)
    reason = f"{error.doing}: {reason}" if error.doing else reason
    print(f"megalign: {'error' if code == BAD_INPUT else 'failed'}: {reason}", file=sys.stderr, flush=True)
    Ending(run_dir, taken).write(code, reason, error.step)
    return code


def code_of(error: UserError) -> int:
    """Return the exit code of bad input, or of a failure where the run had taken steps: its start was accepted."""
    return BAD_INPUT if error.step is None else FAILED


def leave(code: int) -> NoReturn:
    """End the process with `code`, whatever a user's module does at exit or leaves running."""
    with suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)
