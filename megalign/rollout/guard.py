"""Calls a user's function and turns whatever it raises, and a call that takes too long, into an ordinary error."""

from __future__ import annotations

import faulthandler
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from megalign.modules import describe

STDERR = 2  # faulthandler writes to a file descriptor
PATIENCE_S = 10.0  # added to 1.5 x the limit: then a call that holds the interpreter ends the process
Result = TypeVar("Result")


class TimeIsUp(BaseException):
    """Raised inside a call that takes too long; not an Exception, so that most code lets it through."""


class CallFailed(Exception):
    """Says in a few words what the user's function did instead of returning a result."""


@contextmanager
def time_limit(seconds: float) -> Iterator[Callable[[], bool]]:
    """Raise `TimeIsUp` in the block after `seconds` and again every second; yield a function: was it raised?

    Uses SIGALRM, which also interrupts sleeps, regular expressions and products of huge integers, but reaches only the
    main thread: in other threads there is no limit. Blocks may be nested.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    rung, active = False, True

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal rung
        rung = True
        if active:
            raise TimeIsUp

    handler, began = signal.signal(signal.SIGALRM, ring), time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        try:
            yield lambda: rung
        finally:
            active = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if left:  # an outer block's
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), interval)


def call(function: Callable[..., Result], *arguments: Any, limit_s: float) -> Result:
    """Call the function and return its result; `CallFailed` where it raises, exits or takes longer than `limit_s`."""
    with (
        _backstop(1.5 * limit_s + PATIENCE_S),
        _interrupts() as interrupted,
        _failures(interrupted, limit_s),
        time_limit(limit_s) as rung,
    ):
        result = function(*arguments)
        if rung():  # the function caught the TimeIsUp that should have ended it
            raise TimeIsUp
        return result


@contextmanager
def _backstop(seconds: float) -> Iterator[None]:
    """Print every thread's stack and end the process with code 1 where the block takes longer.

    Needed for a builtin that loops for ever, such as sum(itertools.repeat(0)): Python then handles no signal and runs
    no other thread, and only ending the process keeps the job from waiting for ever.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def _failures(interrupted: Callable[[], bool], limit_s: float) -> Iterator[None]:
    """Raise `CallFailed` for whatever ends the block."""
    try:
        yield
    except CallFailed:
        raise
    except TimeIsUp:
        raise CallFailed(f"did not return in {limit_s:g} s") from None
    except KeyboardInterrupt as error:
        if interrupted():
            raise
        raise CallFailed(f"raised {describe(error)}") from error
    except BaseException as error:
        raise CallFailed(f"raised {describe(error)}") from error


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed in the block: user code may raise the same error."""
    pressed = False
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield lambda: False
        return
    before: Callable[[int, FrameType | None], Any] = handler

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, handler)
