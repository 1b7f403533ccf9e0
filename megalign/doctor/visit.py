"""Runs checks on every rank and brings what they read to rank 0, which judges it; only the job's store is needed."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalign.config.job import JobConfig
from megalign.doctor.finding import Finding, where
from megalign.runtime.distributed import World
from megalign.runtime.ranks import by_value, span
from megalign.schema import UserError, reason_of

FAREWELL_S = 5.0  # for rank 0 to wait until the others have noticed that it has printed
STOPPED = "stopped with another rank"
REPORT_S = 10.0  # for ranks to wait until rank 0 has printed, because a launcher ends all once one has ended


class NoAnswer(Exception):
    """Raised on every rank when some ranks did not bring their part of a check in time; it ends the visit."""


class Stopped(Exception):
    """Raised inside a check on ranks that exchange values when the check has failed on another rank."""


@dataclass
class Visit:
    """Holds what checks share: the ranks, their hosts, the job's configuration, and the way to rank 0."""

    world: World
    store: dist.Store
    config_file: Path | None = None
    cfg: JobConfig | None = None  # None: no configuration is given, or it is not valid; only machines are checked
    patience_s: float = 30.0  # that ranks wait for each other in a check
    hosts: list[str] = field(default_factory=list)  # host name of every rank
    closed: bool = False  # whether some ranks cannot reach others, so that none must connect
    findings: list[Finding] = field(default_factory=list)  # on rank 0
    doing: str = "meeting"  # the check in progress
    began: float = field(default_factory=time.monotonic)
    calls: int = 0

    def meet(self) -> None:
        """Learn the host name of every rank; the first thing to do."""
        self.hosts = self.share("host names", socket.gethostname())

    def share(self, what: str, value: Any) -> list[Any]:
        """Return the plain values of all ranks, in rank order, on every rank.

        NoAnswer where a rank brings none in time, Stopped where the check in progress has failed on a rank.
        """
        values = self._exchange(what, value, last=False)
        if values is None:
            raise Stopped
        return values

    def bring(self, what: str, value: Any) -> list[Any]:
        """Return the plain values of all ranks on rank 0, an empty list elsewhere; ends a check on all ranks.

        Ranks that would still share something in the check get Stopped there, and then come here too.
        """
        while True:
            values = self._exchange(what, value, last=True)
            if values is not None:
                return values

    def leave(self) -> None:
        """Wait until rank 0 leaves too; rank 0, which serves the store, waits until the others have read that."""
        with suppress(RuntimeError):
            if not self.world.is_main:
                self.store.wait(["doctor/reported"], timedelta(seconds=REPORT_S))
            self.store.set("doctor/reported", "yes")
            left, until = self.store.add("doctor/left", 1), time.monotonic() + FAREWELL_S
            while self.world.is_main and left < self.world.size and time.monotonic() < until:
                time.sleep(0.05)
                left = self.store.add("doctor/left", 0)

    def _exchange(self, what: str, value: Any, *, last: bool) -> list[Any] | None:
        """Exchange a value of each rank through the store; None where some ranks end the check and others go on.

        last: this rank ends the check, so that only rank 0 needs the values; other ranks get an empty list.
        """
        self.calls += 1
        folder = f"doctor/{self.calls}"
        try:
            self.store.set(f"{folder}/{self.world.rank}", json.dumps([last, value], default=str))
            if not self.world.is_main:
                return self._passed_on(folder, what)
            answers = self._collect(folder, what)
            values = [value for _, value in answers] if len({last for last, _ in answers}) == 1 else None
            self.store.set(f"{folder}/all", json.dumps(["", values if values is None or not last else []]))
            return values
        except RuntimeError as error:  # the store's
            raise NoAnswer(f"{what}: rank 0, which all ranks meet at, is gone: {reason_of(error)}") from None

    def _collect(self, folder: str, what: str) -> list[list[Any]]:
        """Return what every rank has brought."""
        until, answers = time.monotonic() + self.patience_s, []
        for rank in range(self.world.size):
            if not self._came(f"{folder}/{rank}", until - time.monotonic()):
                silent = [rank for rank in range(self.world.size) if not self.store.check([f"{folder}/{rank}"])]
                named = where(silent, self.hosts) if self.hosts else span(silent)
                problem = f"{what}: rank 0 waited {self.patience_s:g} s for {named}"
                self.store.set(f"{folder}/all", json.dumps([problem, None]))
                raise NoAnswer(problem)
            answers.append(json.loads(self.store.get(f"{folder}/{rank}")))
        return answers

    def _passed_on(self, folder: str, what: str) -> list[Any] | None:
        """Return what rank 0 passes on."""
        patience_s = self.patience_s + 5.0  # rank 0 ends its waiting first, and knows for whom it waited
        if not self._came(f"{folder}/all", patience_s):
            raise NoAnswer(f"{what}: rank {self.world.rank} waited {patience_s:g} s for rank 0")
        problem, values = json.loads(self.store.get(f"{folder}/all"))
        if problem:
            raise NoAnswer(problem)
        shared: list[Any] | None = values
        return shared

    def _came(self, key: str, seconds: float) -> bool:
        try:
            self.store.wait([key], timedelta(seconds=max(0.1, seconds)))
        except RuntimeError:
            return bool(self.store.check([key]))  # raises where the store is gone
        return True


@dataclass(frozen=True, slots=True)
class Check:
    """Names a check. `read` runs on every rank and returns plain values; `judge` gets those of all ranks on rank 0."""

    name: str
    read: Callable[[Visit], Any]
    judge: Callable[[Visit, list[Any]], list[Finding]]


def run_checks(visit: Visit, checks: Sequence[Check]) -> None:
    """Run checks one after another on all ranks; on rank 0, add what was found to the visit's findings.

    A check that raises is itself a finding. NoAnswer ends it all: the ranks are no longer in step.
    """
    for check in checks:
        visit.doing = f"check {check.name}"
        value, problem = None, ""
        try:
            value = check.read(visit)
        except NoAnswer:
            raise
        except Stopped:
            problem = STOPPED
        except UserError as error:
            problem = str(error)
        except Exception as error:
            problem = f"{type(error).__name__}: {reason_of(error)}"
        answers = visit.bring(visit.doing, [value, problem])
        if visit.world.is_main:
            visit.findings += _judged(visit, check, answers)


def _judged(visit: Visit, check: Check, answers: list[Any]) -> list[Finding]:
    problems = {problem: ranks for problem, ranks in by_value([answer[1] for answer in answers]).items() if problem}
    if problems:
        return [
            Finding(
                check.name,
                "fail",
                f"could not be checked on {where(ranks, visit.hosts)}: {problem}",
                "correct this first",
            )
            for problem, ranks in problems.items()
            if problem != STOPPED
        ]
    try:
        return check.judge(visit, [answer[0] for answer in answers])
    except Exception as error:
        found = f"could not be judged: {type(error).__name__}: {reason_of(error)}"
        return [Finding(check.name, "fail", found, "report this as a defect of megalign")]
