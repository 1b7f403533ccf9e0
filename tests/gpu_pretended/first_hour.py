"""The first hour's script on the pretended device: `python -m tests.gpu_pretended.first_hour [ARGUMENTS]`.

Two parts of its own crash and run out of time. `--part` as the first argument begins the command of a part.
"""

from __future__ import annotations

import collections
import os
import signal
import sys
import time
import warnings

import torch
import transformers  # noqa: F401  before there is a device: it asks for CUDA's properties when imported

from tests.gpu import first_hour
from tests.gpu.first_hour_parts import run
from tests.gpu.first_hour_parts.report import Report
from tests.gpu_pretended import device

PARTS = (
    *first_hour.PARTS,
    first_hour.Part("crash", f"{__name__}:crash", "nothing"),
    first_hour.Part("hang", f"{__name__}:hang", "nothing"),
    first_hour.Part("wrong", f"{__name__}:wrong", "nothing"),
)


def crash(report: Report) -> None:
    """Die as a fault in a kernel's host code does, after a check."""
    report.check("before", True, expected="yes", found="yes")
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(report: Report) -> None:
    """Never end, with a process beside it."""
    report.check("before", True, expected="yes", found="yes")
    if child := os.fork():
        report.figure("child", child)
    time.sleep(3600)


def wrong(report: Report) -> None:
    """Find something else than expected."""
    report.check("sum", False, expected="4", found=5)


class Warned(collections.Counter[str]):
    """Warns of a wait as torch's sync debug mode does."""

    def __setitem__(self, key: str, value: int) -> None:
        if value > self.get(key, 0):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        super().__setitem__(key, value)


def main(arguments: list[str]) -> int:
    """Install the device and run the script, or one part of it."""
    torch.set_num_threads(1)
    device.install()
    if arguments[:1] != ["--part"]:
        child = (sys.executable, "-m", "tests.gpu_pretended.first_hour", "--part")
        return first_hour.main(arguments, parts=PARTS, child=child)
    device.WAITS = Warned()
    torch.cuda.set_sync_debug_mode = lambda mode: None
    return run.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
