"""Ends processes with the one that started them, even where that one is killed and can end nothing itself."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, TypeAlias

PARENT = "MEGALIGN_PARENT"  # names the starting process to the started one, and not to that one's own children
SET_PARENT_DEATH_SIGNAL, SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # each asks a launcher to stop its job
Handler: TypeAlias = Callable[[int, FrameType | None], None]


class Asked(BaseException):
    """Says that a signal, which the message names, asks a launcher to stop while it runs no rank."""


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when the launcher that started it ends.

    Ranks save on SIGTERM, all at the same step, so that a launcher's death costs no work. Without a launcher this does
    nothing.
    """
    parent = os.environ.pop(PARENT, "")
    if not parent or sys.platform != "linux":
        return
    set_parent_death_signal(signal.SIGTERM)
    if os.getppid() != int(parent):  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGTERM)


def set_parent_death_signal(number: int) -> None:
    """Have the kernel send a signal to this process when the one that started it ends, even if that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, int(number))


def adopt_orphans() -> None:
    """Become the parent of this process's grandchildren whose own parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1)


def await_orphans(wait_s: float) -> None:
    """Wait until all adopted processes have ended; kill those that have not in time."""
    import psutil

    until = time.monotonic() + wait_s
    with suppress(ChildProcessError):  # raised when there are no more
        while time.monotonic() < until:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.1)
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()


def on_stop_signals(handler: Handler) -> dict[int, Any]:
    """Call `handler` for signals that ask for a stop; return the handlers before it, to be set again by number.

    Signals that are ignored stay so: `nohup` asks for that.
    """
    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}
