"""Signals from the first moment of a process on, and in a main thread that never returns to Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from megalign.runtime.status import RESULT_FILE
from megalign.runtime.stop import Stop
from tests.support.tiny_jobs import ROOT

# pthread_mutex_lock is not interrupted by signals: as in a collective, Python's own handlers never run.
STUCK = """
import ctypes, sys
from megalign.runtime.stop import Stop

with Stop(same_request_s=0.3).listening() as stop:
    stop.report = lambda code, reason: print("reported:", code, reason, flush=True)
    if sys.argv[1] == "steps":
        stop.wait_for_step()
    print("ready", flush=True)
    mutex = ctypes.create_string_buffer(256)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def stuck(mode: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_before_the_ranks_began_the_first_signal_ends_the_process(number):
    process = stuck("alone")
    process.send_signal(number)
    told, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert f"megalign: stopped by {number.name} before there was anything to save\n" in told and "reported: 75" in told


def test_a_second_signal_ends_a_process_that_waits_for_ever():
    process = stuck("steps")
    try:
        for number in (signal.SIGTERM, signal.SIGINT):  # one request, from a terminal and from a launcher
            process.send_signal(number)
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        told, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "reported: 1 ended at once by a second signal, SIGUSR1; nothing was saved after the first, SIG" in told


def test_a_signal_is_noted_at_once_and_is_no_business_of_forked_processes():
    stop = Stop()
    before = signal.getsignal(signal.SIGTERM)
    with stop.listening():
        stop.wait_for_step()
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(3)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(0.1)
        assert stop.asked == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before and signal.set_wakeup_fd(-1) == -1


def test_codes_are_those_of_the_status():
    from megalign.runtime import status, stop

    assert (stop.FAILED, stop.STOPPED) == (status.FAILED, status.STOPPED) and RESULT_FILE
