"""Starts the ranks of one node, restarts the job where a rank dies, and ends it on all nodes together."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

from megalign.runtime.exit_codes import BAD_INPUT, DONE, FAILED, STOPPED
from megalign.runtime.meeting import Meeting, Verdict
from megalign.runtime.nodes import Nodes
from megalign.runtime.parent import PARENT, STOP_SIGNALS, Asked, on_stop_signals
from megalign.schema import UserError

FINAL = (BAD_INPUT, STOPPED)  # codes after which another attempt would end in the same way
LOOK_S = 1.0  # between two looks whether another node has ended the job
ASKED_S = 1.0  # a signal to a whole process group may end a rank before it reaches this process
STRONGER_S = 3.0  # for another node's verdict: its rank may have been refused, and ours have failed because of that
LEAVING_S = 30.0  # for ranks to end by themselves after another node's have, with a job that is done or has saved
PARTING_S = 300.0  # to wait for the other nodes' word after this node's ranks are done


class Agent(LocalElasticAgent):
    """Runs one node's ranks for torch's elastic launcher, with one count of restarts and one ending for all nodes.

    torch counts restarts on each node apart, and there only those that begin with the node's own ranks. result: the
    file in which a rank leaves the job's exit code.
    """

    def __init__(self, nodes: Nodes, spec: WorkerSpec, meeting: Meeting, *, logs: str, result: Path | None) -> None:
        super().__init__(spec, DefaultLogsSpecs(log_dir=logs))
        self.nodes, self.meeting, self.result = nodes, meeting, result
        self.attempt, self.first_rank = 0, 0
        self.failure = ""
        self.asked = ""  # the signal that asked for a stop
        self.ranks_run = False
        self.looked = self.seen = 0.0  # when another node's verdict was last looked for, and first seen

    def take_signals(self) -> None:
        """Pass signals that ask for a stop on to the ranks from now on."""
        on_stop_signals(self._ask)

    def _ask(self, number: int, _: Any) -> None:
        self.asked = signal.Signals(number).name
        if not self.ranks_run:
            raise Asked(self.asked)
        self._pass_on()

    def _pass_on(self) -> None:
        """Ask the ranks, and not their helper processes, to save and end."""
        for process in self._processes().values():
            process.terminate()

    def _processes(self) -> dict[int, Any]:
        """Return {rank: process} of the ranks of this node."""
        handlers: Mapping[int, Any] = getattr(self._pcontext, "subprocess_handlers", {})
        return {self.first_rank + local_rank: handler.proc for local_rank, handler in handlers.items()}

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self.ranks_run = False
        if self.asked:
            raise Asked(self.asked)
        super()._rendezvous(worker_group)

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        """Number the ranks in the order of NODE_RANK and agree on the attempt's number; called on every node."""
        facts = self.meeting.exchange(store, group_rank, {"rank": self.nodes.rank, "failure": self.failure})
        order = [fact["rank"] for fact in facts]
        if self.nodes.rank is not None and sorted(order) != list(range(self.nodes.count)):
            twice = min(rank for rank in order if order.count(rank) > 1)
            problem = f"NODE_RANK is {twice} on two nodes: must be different on each"
            self.meeting.end(Verdict(BAD_INPUT, problem, self.nodes.name))
            raise UserError(problem)
        place = group_rank if self.nodes.rank is None else self.nodes.rank
        self.attempt, self.failure = facts[0]["attempt"], ""
        self._remaining_restarts = spec.max_restarts - self.attempt
        self.meeting.final = self._remaining_restarts <= 0
        if self.attempt:
            failures = sorted({fact["failure"] for fact in facts} - {""}, key=_by_weight)
            why = failures[0] if failures else "a node came anew"
            _say(f"{why}; restart {self.attempt} of {spec.max_restarts}")
        size, world_size = spec.local_world_size, spec.local_world_size * group_world_size
        self.first_rank = place * size
        return [
            Worker(
                local_rank=number, global_rank=rank, role_rank=rank, world_size=world_size, role_world_size=world_size
            )
            for number, rank in enumerate(range(self.first_rank, self.first_rank + size))
        ]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if self.result is not None:
            self.result.unlink(missing_ok=True)  # the code of an attempt that failed
        os.environ[PARENT] = str(os.getpid())
        self.ranks_run = True
        started = super()._start_workers(worker_group)
        self.take_signals()  # torch's own handlers would kill ranks that save
        if self.asked:
            self._pass_on()
        return started

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        super()._stop_workers(worker_group)
        for process in self._processes().values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # helpers of a killed rank would still write its checkpoint

    def _exit_barrier(self) -> None:
        """Do nothing: `_monitor_workers` has waited for the verdict."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = {rank: process.poll() for rank, process in self._processes().items()}  # before torch ends the others
        codes = {rank: code for rank, code in codes.items() if code}
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY:
            return RunResult(state=WorkerState.FAILED) if self._ended_elsewhere() else result
        if result.state == WorkerState.SUCCEEDED:
            held = self.held()
            if held is not None:
                self.meeting.end(Verdict(held, node=self.nodes.name))
            else:
                self.meeting.await_others(self.attempt, PARTING_S)
            return result
        codes = codes or {rank: failure.exitcode for rank, failure in result.failures.items()}
        verdict = self._judge(codes)
        if verdict is not None:
            self._remaining_restarts = 0
        return result

    def _ended_elsewhere(self) -> bool:
        """Return whether another node has ended the job, so that this node's ranks must end."""
        if time.monotonic() - self.looked < LOOK_S:
            return False
        self.looked = time.monotonic()
        verdict = self.meeting.verdict()
        if verdict is None:
            return False
        self.seen = self.seen or time.monotonic()
        self._remaining_restarts = 0
        return verdict.code not in (DONE, STOPPED) or time.monotonic() - self.seen > LEAVING_S

    def _judge(self, codes: Mapping[int, int]) -> Verdict | None:
        """Decide on the ending of a job whose ranks ended with these codes; None where it is restarted."""
        self.failure = _described(codes)
        shared = self.meeting.verdict()
        if shared is not None:
            return shared
        held = self.held()
        code = held if held in (DONE, STOPPED) else next((code for code in codes.values() if code in FINAL), None)
        if code is not None:
            return self._end(code)
        if all(-code in STOP_SIGNALS for code in codes.values()):
            time.sleep(0.0 if self.asked else ASKED_S)
            if self.asked:
                return self._end(STOPPED, f"stopped by {self.asked} while the ranks were starting")
        if self.attempt < self._worker_group.spec.max_restarts and not self.asked and not self.meeting.lost:
            return None
        shared = self.meeting.verdict(wait_s=STRONGER_S) if self.nodes.count > 1 else None
        gone = "; the node with the store is gone" if self.meeting.lost else ""
        return shared or self._end(FAILED if held is None else held, self.failure + gone)

    def _end(self, code: int, why: str = "") -> Verdict:
        return self.meeting.end(Verdict(code, why or self.failure, self.nodes.name))

    def held(self) -> int | None:
        """Return the code that a rank of this node has left in the result file, if any."""
        if self.result is None or not self.result.exists():
            return None
        return int(self.result.read_text())


def _described(codes: Mapping[int, int]) -> str:
    """Return which rank failed and how: the first that was killed, else the first."""
    if not codes:
        return "a rank hangs in the kernel"
    rank = min(codes, key=lambda rank: (codes[rank] > 0 or -codes[rank] in STOP_SIGNALS, rank))
    if codes[rank] > 0:
        return f"rank {rank} ended with exit code {codes[rank]}"
    return f"rank {rank} was ended by {signal.Signals(-codes[rank]).name}"


def _by_weight(failure: str) -> tuple[bool, str]:
    """Sort ranks that were killed before those that failed by themselves, maybe because of the others."""
    return "was ended by" not in failure, failure


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)
