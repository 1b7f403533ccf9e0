"""Writes what the ranks of a job that hangs were doing: a file a rank with its stacks, and one about all of them."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import psutil
import torch

from megalign.files import write_whole
from megalign.runtime.signs import Seen, Verdict, process_of, state_of

FOLDER = "watchdog"  # in the run directory
DUMP_SIGNAL = signal.SIGUSR2  # has a rank write its stacks, from C: also where no Python code can run


class RankFile:
    """Holds this rank's file of the report open, since a process that hangs may not be able to open one.

    Without a folder yet, everything goes to standard error. A file that nothing was written to is removed at the end.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.file: IO[str] = sys.stderr
        self.path: Path | None = None

    def open_in(self, folder: Path) -> None:
        """Write to a file in the folder from now on; where that is impossible, still to standard error."""
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / f"rank_{self.rank}.txt"
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self.dump_on_signal()

    def dump_on_signal(self) -> None:
        """Have DUMP_SIGNAL write the stacks of all threads, whatever they do."""
        with suppress(ValueError, OSError, AttributeError):  # standard error may have no descriptor, as in a notebook
            faulthandler.register(DUMP_SIGNAL, file=self.file, all_threads=True)

    def exit_later(self, seconds: float) -> None:
        """End the process with its stacks and code 1 after some seconds, unless called again: from C, by a timer."""
        with suppress(ValueError, OSError, AttributeError):
            faulthandler.dump_traceback_later(seconds, exit=True, file=self.file)

    def write(self, about: str) -> None:
        """Write a few words about this rank, the stacks of all its threads, and its last collectives, if recorded."""
        with suppress(OSError, ValueError):
            self.file.write(f"{now()} rank {self.rank}: {about}\n")
            self.file.flush()
        with suppress(OSError, ValueError, AttributeError):
            faulthandler.dump_traceback(file=self.file, all_threads=True)
        recorded = collectives()
        if recorded and self.path is not None:
            with suppress(OSError):
                write_whole(self.path.with_suffix(".collectives.json"), recorded)

    def close(self) -> None:
        """Stop the timer and forget the signal; remove the file if nothing was written to it, and an empty folder."""
        with suppress(ValueError, OSError):
            faulthandler.cancel_dump_traceback_later()
            faulthandler.unregister(DUMP_SIGNAL)
        if self.path is None:
            return
        with suppress(OSError):
            self.file.close()
            if self.path.stat().st_size == 0:
                self.path.unlink()
            self.path.parent.rmdir()


def collectives() -> str:
    """Return the flight recorder's collectives as JSON; "" where it records none (TORCH_FR_BUFFER_SIZE)."""
    dump: Any = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    with suppress(Exception):  # a private function, and the job is ending anyway
        text = dump(True, False)
        text = text.decode() if isinstance(text, bytes) else str(text)
        return text if json.loads(text).get("entries") else ""
    return ""


def write_summary(folder: Path, verdict: Verdict, seen: Mapping[int, Seen], here: str, answered: set[int]) -> None:
    """Write why the job ends, and a line for each rank that is known: what it did, since when, where its stacks are."""
    with suppress(OSError), open(folder / "summary.txt", "a", encoding="utf-8") as file:
        file.write(f"{now()} {verdict.reason}\n")
        latest = max((each.heard for each in seen.values()), default=0.0)
        for rank, each in sorted(seen.items()):
            sign = each.sign
            told = "" if rank in answered else f"; {state_of(sign, here)}"
            told += f"; its stacks are in rank_{rank}.txt" if _has_stacks(folder, rank) else ""
            waits = f", waiting in {sign.waits}" if sign.waits else ""
            file.write(
                f"rank {rank} (process {sign.pid} on {sign.host}): {sign.phase}{waits}; last progress "
                f"{latest - each.moved:.1f} s ago{told}\n"
            )


def _has_stacks(folder: Path, rank: int) -> bool:
    with suppress(OSError):
        return (folder / f"rank_{rank}.txt").stat().st_size > 0
    return False


def dump_others(ranks: Iterable[int], seen: Mapping[int, Seen], here: str) -> None:
    """Have those of these ranks that are on this machine write their stacks; one that is stopped cannot."""
    _signal(ranks, seen, here, DUMP_SIGNAL)


def end_others(ranks: Iterable[int], seen: Mapping[int, Seen], here: str) -> None:
    """End those of these ranks that are on this machine, where they cannot end themselves."""
    _signal(ranks, seen, here, signal.SIGKILL)


def _signal(ranks: Iterable[int], seen: Mapping[int, Seen], here: str, number: int) -> None:
    for rank in ranks if here else ():
        sign = seen[rank].sign if rank in seen else None
        process = process_of(sign) if sign is not None and sign.machine == here and sign.pid != os.getpid() else None
        with suppress(psutil.Error, OSError):
            if process is not None:
                process.send_signal(number)


def now() -> str:
    """Return the local time with its zone, to the second."""
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
