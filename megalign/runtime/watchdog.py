"""Ends a job of which a rank hangs, with a report of what each rank was doing in the run directory.

Each rank publishes a sign of life in the job's store; rank 0 judges all of them, the others judge rank 0. Collectives
themselves wait far longer than `timeout_s`: a rank may wait for another as long as that one makes progress.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from megalign.runtime.exit_codes import FAILED
from megalign.runtime.hang_report import FOLDER, RankFile, dump_others, end_others, write_summary
from megalign.runtime.heart import Heart
from megalign.runtime.signs import Seen, Sign, Verdict, has_ended, judge, place_of, state_of, waiting_in
from megalign.runtime.stop import end_now

LONGEST_INTERVAL_S = 2.0
RANKS_A_SECOND = 500  # that publish their signs: more would keep the store busy
FIRST_SIGN_S = 30.0  # to wait for rank 0's first sign: it has met the others just now
REPORT_S = 6.0  # for ranks to write their files
DUMP_S = 0.5  # for the stacks of ranks that only C code can write
TIMER_S = 15.0  # added to the time-out where others can end a rank: they write their report first


class Watchdog:
    """Watches this rank and, through the job's store, the others, from `start` to `close`.

    write: reports the reason and the last finished step as the job's status; the first rank's counts. also: called once
    in an interval.
    """

    def __init__(
        self,
        heart: Heart,
        *,
        rank: int,
        size: int,
        timeout_s: float,
        write: Callable[[str, int | None], None] = lambda reason, step: None,
        also: Callable[[], None] = lambda: None,
    ) -> None:
        self.heart, self.rank, self.size, self.timeout_s, self.write, self.also = (
            heart,
            rank,
            size,
            timeout_s,
            write,
            also,
        )
        self.interval_s = max(min(LONGEST_INTERVAL_S, timeout_s / 20), size / RANKS_A_SECOND)
        self.file = RankFile(rank)
        self.folder: Path | None = None
        self.machine, self.pid, self.born = place_of()
        now = time.monotonic()
        self.seen = {other: Seen(Sign.none(), now, now) for other in (range(size) if rank == 0 else (0,))}
        self._store: Any = None
        self._tick = self._progress = 0
        self._answered = time.monotonic()
        self._closed, self._ending = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, store: dist.Store) -> None:
        """Begin to watch, through a connection of its own to the store."""
        own: Any = store
        self._store = dist.PrefixStore("watchdog", own.clone())
        self._store.set_timeout(timedelta(seconds=max(self.timeout_s, 10.0)))
        self.file.dump_on_signal()
        self._publish()
        with suppress(RuntimeError):  # to know rank 0's process: where it stops, the store may say nothing any more
            self._store.wait(["rank 0"], timedelta(seconds=min(self.timeout_s, FIRST_SIGN_S)))
            self._read()
        for function in (self._watch, self._guard):
            thread = threading.Thread(target=function, name="watchdog", daemon=True)
            thread.start()
            self._threads.append(thread)

    def report_in(self, run_dir: Path) -> None:
        """Write reports into the run directory from now on."""
        self.folder = run_dir / FOLDER
        self.file.open_in(self.folder)

    def close(self) -> None:
        """Say that this rank ends by itself, and stop watching."""
        if not self._threads or self._closed.is_set():
            return
        self.await_end()
        self._closed.set()
        for thread in self._threads:
            thread.join(LONGEST_INTERVAL_S)
        with suppress(RuntimeError):
            self._publish(left=True)
        self.file.close()

    def leave(self) -> None:
        """Stop watching without a word to the others, which learn that this rank has ended."""
        self._closed.set()
        self.file.close()

    def await_end(self) -> None:
        """Wait for the end of the process if the watchdog is about to end it."""
        if self._ending.is_set():
            time.sleep(4 * REPORT_S)

    def missing(self) -> str:
        """Return which rank has ended without a word, or says nothing for a few intervals; "" where all are there.

        For a rank that lost its connection to another, or whose collective failed.
        """
        with suppress(RuntimeError):
            self._read_all()
            for rank in self._others():
                if has_ended(self.seen[rank].sign, self.machine):
                    return f"rank {rank} of {self.size}: {state_of(self.seen[rank].sign, self.machine)}"
        return ""

    def silent(self) -> str:
        """Return which rank gives no sign of life for a few intervals; "" where all do, or the store is gone."""
        with suppress(RuntimeError):
            self._read_all()
            before = {rank: self.seen[rank].sign.tick for rank in self._others()}
            time.sleep(min(3 * self.interval_s, LONGEST_INTERVAL_S * 2))
            self._read_all()
            for rank, tick in before.items():
                if self.seen[rank].sign.tick == tick and not self.seen[rank].sign.left:
                    return f"rank {rank} of {self.size}: {state_of(self.seen[rank].sign, self.machine)}"
        return ""

    def _others(self) -> list[int]:
        return [rank for rank, each in self.seen.items() if rank != self.rank and not each.sign.left]

    def _watch(self) -> None:
        """Publish signs, read those of the others and judge them, until the job ends."""
        while not self._closed.wait(self.interval_s):
            self.file.exit_later(self.timeout_s + (TIMER_S if self.size > 1 else 0.0))
            with suppress(Exception):
                self.also()
            try:
                self._publish()
                told = self._store.get("verdict") if self._store.check(["verdict"]) else b""
                self._read()
                self._answered = time.monotonic()
                verdict = _unpack(told) if told else self._judge()
            except Exception:
                # Mostly whoever serves the store has gone: the ranks end by themselves, or the guard ends them. Without
                # this thread a rank that is well would be ended as a silent one.
                continue
            if verdict is not None and not self._closed.is_set():
                self._end(verdict)

    def _guard(self) -> None:
        """End this rank where the store does not answer, upon which `_watch` waits for ever."""
        while not self._closed.wait(self.interval_s):
            if time.monotonic() - self._answered <= self.timeout_s + 2 * self.interval_s:
                continue
            reason = f"rank 0 of {self.size}, or the launcher that serves the job's store, gave no answer for "
            reason += f"{self.timeout_s:g} s (watchdog.timeout_s) in {self.heart.phase}"
            if 0 in self.seen:
                reason += f": {state_of(self.seen[0].sign, self.machine)}"
            self._end(Verdict((0,), reason, self.heart.step, silent=True), alone=True)

    def _publish(self, *, left: bool = False) -> None:
        self._tick += 1
        heart = self.heart
        with suppress(Exception):  # a sign with the count before says more than none
            self._progress = heart.progress()
        sign = Sign(
            self._tick,
            self._progress,
            heart.phase,
            heart.step,
            _waits(),
            left,
            socket.gethostname(),
            self.machine,
            self.pid,
            self.born,
        )
        self._store.set(f"rank {self.rank}", sign.pack())

    def _read_all(self) -> None:
        """Read the last signs of all ranks; only rank 0 judges more than one."""
        for rank in range(self.size):
            self.seen.setdefault(rank, Seen(Sign.none(), time.monotonic(), time.monotonic()))
        self._read()

    def _read(self) -> None:
        """Read the last signs of the ranks that are watched, of those that have begun to publish them."""
        known = [rank for rank, each in self.seen.items() if each.sign.tick or self._store.check([f"rank {rank}"])]
        for rank, text in zip(known, self._store.multi_get([f"rank {rank}" for rank in known]) if known else ()):
            self.seen[rank].hear(Sign.unpack(text), time.monotonic())

    def _speaks_for_machine(self, verdict: Verdict) -> bool:
        """Tell whether this is the first rank on its machine that answers."""
        here = [rank for rank, each in self.seen.items() if each.sign.machine == self.machine]
        return self.rank == min((rank for rank in here if rank not in verdict.ranks), default=self.rank)

    def _judge(self) -> Verdict | None:
        """Return why the job must end, if it must; of all ranks that find a reason at once the first one's counts."""
        now, stalls = time.monotonic(), self.rank == 0
        own = judge(self.seen, self.size, now=now, timeout_s=self.timeout_s, here=self.machine, stalls=stalls)
        if own is None:
            return None
        with suppress(RuntimeError):
            return _unpack(self._store.compare_set("verdict", "", json.dumps({**asdict(own), "by": self.rank})))
        return own

    def _end(self, verdict: Verdict, *, alone: bool = False) -> NoReturn:
        """Write the report, and end this process and silent ones beside it."""
        first = not self._ending.is_set()
        self._ending.set()
        if not first:  # the other thread ends the process
            time.sleep(4 * REPORT_S)
        self.file.exit_later(3 * REPORT_S)  # a disk may be what hangs
        self.file.write(f"{verdict.reason}. This rank: {self.heart.phase}, {_waits() or 'in no collective'}")
        with suppress(RuntimeError):
            if not alone:
                self._store.add(f"reported {self.rank}", 1)
                self._read_all()
        if self._speaks_for_machine(verdict):
            dump_others(verdict.ranks if verdict.silent else (), self.seen, self.machine)
        time.sleep(DUMP_S)
        answered = {self.rank} if alone else self._await_files(verdict)
        if alone or self.rank == min(answered, default=self.rank):
            self._report(verdict, answered)
            with suppress(RuntimeError):
                if not alone:
                    self._store.add("summed", 1)
        with suppress(RuntimeError):
            if not alone:
                self._await_all("summed", 1)
        print(f"megalign: rank {self.rank} of {self.size} ends: {verdict.reason}", file=sys.stderr, flush=True)
        mute = set(verdict.ranks) if verdict.silent else set()
        if not alone:  # others may have stopped since
            mute |= {rank for rank, each in self.seen.items() if not each.sign.left} - answered
        end_others(mute, self.seen, self.machine)
        if self.rank == 0:
            time.sleep(1.0)  # it may serve the store, in which the others read that all is written
        end_now(FAILED)

    def _report(self, verdict: Verdict, answered: set[int]) -> None:
        """Write the status, the summary and the line that the launcher's log shows."""
        where = f"; {self.folder} has the stacks of every rank that answered" if self.folder is not None else ""
        self.write(f"{verdict.reason}{where}", verdict.step)
        if self.folder is not None:
            write_summary(self.folder, verdict, self.seen, self.machine, answered)
        print(f"megalign: failed: {verdict.reason}{where}", file=sys.stderr, flush=True)

    def _await_files(self, verdict: Verdict) -> set[int]:
        """Wait until all ranks that can answer have written their files; return those that have."""
        expected = [rank for rank in self.seen if rank not in verdict.ranks or not verdict.silent]
        until, answered = time.monotonic() + REPORT_S, {self.rank}
        while time.monotonic() < until and not answered >= set(expected):
            with suppress(RuntimeError):
                answered |= {rank for rank in expected if self._store.check([f"reported {rank}"])}
            time.sleep(0.05)
        return answered

    def _await_all(self, key: str, count: int) -> None:
        until = time.monotonic() + REPORT_S
        while time.monotonic() < until and self._store.add(key, 0) < count:
            time.sleep(0.05)


def _waits() -> str:
    """Return the collective that this process waits in; "" where that cannot be told."""
    with suppress(Exception):  # it looks into frames of threads that run meanwhile
        return waiting_in()
    return ""


def _unpack(text: bytes) -> Verdict:
    """Rebuild a verdict from the store's text."""
    told = json.loads(text)
    return Verdict(tuple(told["ranks"]), told["reason"], told["step"], told["silent"])
