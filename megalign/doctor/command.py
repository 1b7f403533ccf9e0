"""Runs the command doctor: checks machine, network, storage and inputs on every rank before a job starts.

Run: python -m megalign doctor [CONFIG.yaml] [key.sub=value ...] [--json] [--wait SECONDS], alone or under a launcher
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megalign.config.job import load_config
from megalign.doctor.checks import configuration_check, connected_checks, first_checks
from megalign.doctor.finding import Finding
from megalign.doctor.reach import Unreachable
from megalign.doctor.report import passed, show
from megalign.doctor.visit import Check, NoAnswer, Visit, run_checks
from megalign.runtime.command_line import Parser, program, whole_number
from megalign.runtime.discovery import adopt_launcher
from megalign.runtime.distributed import MeetingError, World, launched, process_group, raise_on_timeout
from megalign.runtime.exit_codes import BAD_INPUT, DONE
from megalign.runtime.parent import end_with_parent
from megalign.runtime.status import guarded, leave, write_result
from megalign.schema import UserError

WAIT_S = 60  # for ranks that have not come; a job waits longer, because machines of a cluster may start slowly
LIMIT_S, LATER = 150.0, 1.1  # for all checks, where a rank is stuck in one; all else has time-outs of its own


def main(arguments: Sequence[str]) -> int:
    """Print the findings; return 0, or 2 where one is a fail."""
    parser = Parser(
        prog=f"{program()} doctor",
        usage=f"{program()} doctor [CONFIG.yaml] [key.sub=value ...] [--json] [--wait SECONDS]",
        description="check machine, network, storage and inputs on every rank before a job starts",
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="the job's file; without it, only machines")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="keys to set, as for train")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--wait", type=whole_number, default=WAIT_S, metavar="SECONDS", help="to wait for other ranks")

    end_with_parent()

    def run() -> int:
        args = parser.parse_intermixed_args(arguments)
        return _Doctor(args.config, args.overrides, as_json=args.json, wait_s=args.wait).run()

    code = guarded(run)
    write_result(code, replace=False)
    return code


class _Doctor:
    """Runs the checks on this rank and reports on rank 0."""

    def __init__(self, config: str | None, overrides: Sequence[str], *, as_json: bool, wait_s: float) -> None:
        self.config, self.overrides, self.as_json, self.wait_s = config, overrides, as_json, wait_s
        self.problem: Finding | None = None  # why the visit ended early
        self.visit: Visit | None = None
        self.ok = True  # what rank 0 concludes, on every rank
        self.began = time.monotonic()
        self.rank, self.size = 0, 1
        self.timer: threading.Timer | None = None

    def run(self) -> int:
        """Run all checks, print the findings on rank 0, and return the exit code."""
        try:
            adopt_launcher(self.wait_s, limit="--wait")
            self.rank, self.size, _ = launched()
            raise_on_timeout()
            with process_group(timeout_s=self.wait_s, limit="--wait", before=self._before):
                self._look(connected_checks(self._visit()))
        except Unreachable:
            pass
        except NoAnswer as error:
            self._end("answers", str(error), "look at the output and the machine of these ranks")
        except MeetingError as error:
            advice = (
                "start all ranks with one MASTER_ADDR, MASTER_PORT and WORLD_SIZE, and open that port between machines"
            )
            self._end("meeting", str(error), advice)
        except UserError as error:
            self._end("meeting", str(error), "correct what the launcher sets")
        return self._report()

    def _report(self) -> int:
        """Print the findings on rank 0, after which the other ranks may end; return the exit code."""
        if self.timer is not None:
            self.timer.cancel()
        if self.rank == 0:
            findings = [*(self.visit.findings if self.visit else []), *([self.problem] if self.problem else [])]
            self.ok = passed(findings)
            hosts = len(set(self.visit.hosts if self.visit else [])) or 1
            seconds = round(time.monotonic() - self.began, 1)
            job = {"ranks": self.size, "hosts": hosts, "config": self.config, "seconds": seconds}
            show(findings, job, as_json=self.as_json)
        elif self.problem is not None:  # rank 0 may be the one that is missing
            found = f"rank {self.rank} on {socket.gethostname()}: {self.problem.found}"
            print(f"megalign: doctor: {found}", file=sys.stderr, flush=True)
        if self.visit is not None:
            self.visit.leave()
        return DONE if self.ok else BAD_INPUT

    def _visit(self) -> Visit:
        assert self.visit is not None
        return self.visit

    def _end(self, check: str, found: str, advice: str) -> None:
        self.problem = Finding(check, "fail", found, advice)
        self.ok = False

    def _give_up(self) -> None:
        """End a rank that is stuck, in a file system or a driver for example; rank 0 reports what it has found."""
        found = f"rank {self.rank} was stuck in {self._visit().doing}: the doctor ends after {LIMIT_S:g} s"
        self._end("answers", found, f"look at what this needs on rank {self.rank}'s machine")
        write_result(BAD_INPUT, replace=False)
        leave(self._report())

    def _before(self, world: World, store: dist.Store) -> None:
        """Make the checks that need only the store, which come first: connecting would wait for what is closed."""
        self.visit = visit = Visit(world, store, config_file=None if self.config is None else Path(self.config))
        # Rank 0 ends first and reports. The others would else be left where a launcher does not end them.
        self.timer = threading.Timer(LIMIT_S if world.is_main else LIMIT_S * LATER, self._give_up)
        self.timer.daemon = True
        self.timer.start()
        visit.meet()
        problem = ""
        if self.config is not None:
            visit.doing = f"reading {self.config}"
            try:
                visit.cfg = load_config(self.config, self.overrides)
            except UserError as error:
                problem = str(error)
            # Checks that talk to each other must be the same on all ranks.
            if any(visit.share("configurations", problem)):
                visit.cfg = None
        self._look([configuration_check(problem), *first_checks(visit)])
        if visit.closed:
            raise Unreachable
        visit.doing = "connecting all ranks"

    def _look(self, checks: Sequence[Check]) -> None:
        """Run checks, and agree with rank 0 on whether all is well so far."""
        visit = self._visit()
        run_checks(visit, checks)
        self.ok = visit.share("the end of the checks", passed(visit.findings))[0]
