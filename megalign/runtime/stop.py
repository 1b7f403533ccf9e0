"""Notes signals that ask a job to stop, from the first moment of its process on; a second one ends the process at once.

Python runs a signal's handler only between two instructions of the main thread, which may wait in a collective for
ever; so a thread listens too.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from megalign.runtime.exit_codes import FAILED, STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Signals this close together are one request: Ctrl-C reaches a rank from the terminal and again from its launcher.
SAME_REQUEST_S = 5.0


class StoppedEarly(BaseException):
    """Says that a signal stops the job before its first step; raised on every rank, and no failure."""


class Stop:
    """Knows whether a signal has asked this process to stop, and which.

    Until `wait_for_step` the process is alone: nothing is there to be saved, and the first signal ends it with code 75.
    After that the first is only noted in `asked`, and one that comes more than `same_request_s` later ends the process
    with code 1.
    """

    def __init__(self, *, same_request_s: float = SAME_REQUEST_S) -> None:
        self.same_request_s = same_request_s
        self.asked = ""  # the signal's name
        self.report: Callable[[int, str], None] = lambda code, reason: None  # called before the process is ended
        self._alone = True
        self._since: float | None = None
        self._listening = False

    def wait_for_step(self) -> None:
        """Only note signals from now on: the job asks for them after each step and saves."""
        self._alone = False

    def ignore(self) -> None:
        """Ignore signals from now on: a launcher sends them to every rank once one has failed, and this one reports."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Hear signals inside the block; in a thread other than the main one, where Python has none, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        wakes = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        listener = threading.Thread(target=self._listen, args=(reads,), name="signals", daemon=True)
        listener.start()
        self._listening = True
        os.register_at_fork(after_in_child=self._leave_to_parent)
        try:
            yield self
        finally:
            self._listening = False
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakes)
            os.close(writes)  # ends the thread
            listener.join()
            os.close(reads)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal in the main thread, so that the step in progress sees one sent by itself."""
        if not self._alone:
            self.asked = self.asked or signal.Signals(number).name

    def _leave_to_parent(self) -> None:
        """Take the signals' defaults in a process forked from this one, which would write into this one's pipe."""
        if self._listening:
            with suppress(ValueError):
                signal.set_wakeup_fd(-1)
                for number in SIGNALS:
                    signal.signal(number, signal.SIG_DFL)

    def _listen(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._hear(signal.Signals(number).name)

    def _hear(self, name: str) -> None:
        if self._alone:
            self._end(f"stopped by {name} before there was anything to save", STOPPED)
        self.asked = self.asked or name
        now = time.monotonic()
        if self._since is None:
            self._since = now
        elif now - self._since > self.same_request_s:
            reason = f"ended at once by a second signal, {name}; nothing was saved after the first, {self.asked}"
            self._end(reason, FAILED)

    def _end(self, reason: str, code: int) -> NoReturn:
        print(f"megalign: {reason}", file=sys.stderr, flush=True)
        with suppress(Exception):
            self.report(code, reason)
        end_now(code)


def end_now(code: int) -> NoReturn:
    """End this process and its helpers, such as those that write a checkpoint, without running anything else of it."""
    import psutil  # a process that is well never needs it

    children: list[Any] = []
    with suppress(psutil.Error):
        children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.Error):
            child.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)
