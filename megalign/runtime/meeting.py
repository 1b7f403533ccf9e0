"""Lets the agents of a job's nodes meet by torch's c10d rendezvous, and agree on how the job ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from megalign.runtime.distributed import MeetingError, await_server, check_address, check_port, tcp_store
from megalign.runtime.exit_codes import BAD_INPUT
from megalign.runtime.nodes import Nodes, address_towards
from megalign.schema import UserError, reason_of

STORE_S = 60  # for one question to the store; the answer is there, or another node is about to give it
# torch compares the nodes' clocks, and takes a node for dead whose last sign is this old: 12 x 5 s of difference pass.
SIGN_S, MISSED_SIGNS = 5, 12
COMMAND = "the command"  # another one is another job, which this one must not end
LEAVE_S = 35.0  # that the node with the store waits for the others, which may need 30 s to end their ranks


@dataclass(frozen=True, slots=True)
class Verdict:
    """Says how the job ended, for all nodes: its exit code, why, and which node (by its message name) saw it."""

    code: int
    why: str = ""
    node: str = ""


class Meeting(RendezvousHandler):
    """Joins the nodes for each attempt of the job; all of them must come, and any of them may end the job.

    job: what must be the same on all nodes. lost: whether the store is gone, with the node that holds it. final:
    whether no further attempt may begin.
    """

    def __init__(self, nodes: Nodes, job: Mapping[str, Any]) -> None:
        self.nodes, self.lost, self.final = nodes, False, False
        self.store, self.serves = _join(nodes)
        self.port = int(self.store.port)  # type: ignore[attr-defined]
        self.notes = dist.PrefixStore(f"megalign.{nodes.job}", self.store)
        self.known: Verdict | None = None
        parameters = RendezvousParameters(
            backend="c10d",
            endpoint=f"{nodes.address}:{self.port}",
            run_id=nodes.job,
            min_nodes=nodes.count,
            max_nodes=nodes.count,
            # A host name might mean nothing to the other nodes.
            local_addr=address_towards(nodes.address, self.port) or nodes.address,
            join_timeout=nodes.timeout_s,
            keep_alive_interval=SIGN_S,
            keep_alive_max_attempt=MISSED_SIGNS,
        )
        # The ranks join the agents' own store. With another one shared, torch would announce it only when its server
        # starts, and a node that takes a dead one's place would wait for its address in vain.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        self.inner = create_handler(self.store, C10dRendezvousBackend(self.store, nodes.job), parameters)
        self._check_job(job)
        self.notes.add("joined", 1)

    def _check_job(self, job: Mapping[str, Any]) -> None:
        """Refuse a node that was started otherwise than the first one, or that meets another job's nodes."""
        name, problem = _difference(self.notes, job, self.nodes.where)
        if not name:
            return
        if name != COMMAND and self.notes.add("attempts", 0) == 0:  # the same job, whose other nodes wait for this one
            self.end(Verdict(BAD_INPUT, problem, self.nodes.name))
        raise UserError(problem)

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until all nodes have come for the next attempt; MeetingError if they do not in time."""
        try:
            attempt = self.notes.add("attempts", 0)
            self.notes.set(f"came {attempt} {self.nodes.rank}", "")
            self.notes.add(f"came {attempt}", 1)
            with _alarm(self.nodes.timeout_s + 2 * SIGN_S):
                return self.inner.next_rendezvous()
        except (RendezvousTimeoutError, TimeoutError):
            raise MeetingError(self._who_came(attempt)) from None
        except (RendezvousConnectionError, dist.DistError) as error:
            self.lost = True
            raise MeetingError(f"{self._store_name()} does not answer ({reason_of(error)})") from None

    def _who_came(self, attempt: int) -> str:
        """Return one line on which nodes came for an attempt and which did not."""
        nodes = self.nodes
        waited = f"waited {nodes.timeout_s} s (RDZV_TIMEOUT) {nodes.where}"
        came = min(nodes.count, self.notes.add(f"came {attempt}", 0))
        if nodes.rank is not None:
            missing = [str(rank) for rank in range(nodes.count) if not self.notes.check([f"came {attempt} {rank}"])]
            came = nodes.count - len(missing)
        if came == nodes.count:
            return f"{waited}: {came} of {came} nodes came without this one; one too many was started, or one twice"
        shown = f", missing: {', '.join(missing[:8])}" if nodes.rank is not None else ""
        return f"{waited}: {came} of {nodes.count} nodes came{shown}; all must be started with the same command"

    def _store_name(self) -> str:
        return f"the store {self.nodes.where}, on which the nodes meet,"

    def exchange(self, store: dist.Store, number: int, mine: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Give every node this node's facts and return those of all, in the order of the rendezvous.

        number: this node's place in that order. Each `attempt` is counted once, by the first node.
        """
        if number == 0:
            mine = {**mine, "attempt": self.notes.add("attempts", 1) - 1}
        store.set(f"facts {number}", json.dumps(mine))
        keys = [f"facts {other}" for other in range(self.nodes.count)]
        try:
            return [json.loads(facts) for facts in store.multi_get(keys)]
        except dist.DistError:
            raise MeetingError(f"a node left {self.nodes.where} while the job began") from None

    def num_nodes_waiting(self) -> int:
        """Return how many nodes wait for a new attempt; 0 where there can be none."""
        if self.final or self.lost:
            return 0
        try:
            return int(self.inner.num_nodes_waiting())
        except (RendezvousError, dist.DistError):
            self.lost = True
            return 0

    def end(self, verdict: Verdict) -> Verdict:
        """End the job on all nodes; return the verdict of the node that was first to end it."""
        self.final = True
        if self.known is None and not self.lost:
            try:
                given = json.dumps(asdict(verdict))
                verdict = Verdict(**json.loads(self.notes.compare_set("verdict", "", given)))
                self.inner.set_closed()
            except (RendezvousError, dist.DistError):
                self.lost = True
        self.known = self.known or verdict
        return self.known

    def verdict(self, *, wait_s: float = 0.0) -> Verdict | None:
        """Return how a node ended the job, if one did; wait_s: how long to wait for it."""
        until = time.monotonic() + wait_s
        while self.known is None and not self.lost:
            try:
                if self.notes.check(["verdict"]):
                    self.known = Verdict(**json.loads(self.notes.get("verdict")))
            except dist.DistError:
                self.lost = True
            if self.known is not None or time.monotonic() >= until:
                break
            time.sleep(0.1)
        return self.known

    def await_others(self, attempt: int, wait_s: float) -> None:
        """Wait until the ranks of all nodes have ended well, or a node has ended the job."""
        until = time.monotonic() + wait_s
        with suppress(dist.DistError):
            done = self.notes.add(f"done {attempt}", 1)
            while done < self.nodes.count and time.monotonic() < until and self.verdict(wait_s=0.1) is None:
                done = self.notes.add(f"done {attempt}", 0)

    def await_join(self, wait_s: float) -> None:
        """Wait until all nodes have joined the store, if this node serves it."""
        until = time.monotonic() + wait_s
        while self.serves and self.notes.add("joined", 0) < self.nodes.count and time.monotonic() < until:
            time.sleep(0.1)

    def leave(self) -> None:
        """Tell the other nodes that this one reads no more; the node with the store waits for those that joined."""
        until = time.monotonic() + LEAVE_S
        with suppress(dist.DistError):
            if self.lost:
                return
            left = self.notes.add("left", 1)
            while self.serves and left < self.notes.add("joined", 0) and time.monotonic() < until:
                time.sleep(0.1)
                left = self.notes.add("left", 0)

    @property
    def use_agent_store(self) -> bool:
        """Tell that the ranks join the store of the agents."""
        return True

    def get_backend(self) -> str:
        """Return the rendezvous' kind."""
        return self.inner.get_backend()

    def get_run_id(self) -> str:
        """Return the job's name, RDZV_ID."""
        return self.inner.get_run_id()

    def is_closed(self) -> bool:
        """Tell whether the job has ended."""
        return self.inner.is_closed()

    def set_closed(self) -> None:
        """Allow no further attempt."""
        self.inner.set_closed()

    def shutdown(self) -> bool:
        """Allow no further attempt, and send no more signs of life."""
        with suppress(RendezvousError, dist.DistError):
            return self.inner.shutdown()
        return False


def _join(nodes: Nodes) -> tuple[dist.Store, bool]:
    """Return the store by which the nodes meet, and whether this process serves it."""
    check_address(nodes.address, nodes.port, name=nodes.address_name)
    timeout, until = timedelta(seconds=nodes.timeout_s), time.monotonic() + nodes.timeout_s
    try:
        if nodes.serves and nodes.port:
            check_port(nodes.port)
        store = _served(nodes, timeout)
        if store is not None:
            return _patient(store), True
        await_server(nodes.address, nodes.port, until, who="the node that serves the store")
        return _patient(tcp_store(nodes.address, nodes.port, serves=False, timeout=timeout)), False
    except (RuntimeError, OSError) as error:
        waited = f"waited up to {nodes.timeout_s} s (RDZV_TIMEOUT) {nodes.where}"
        raise MeetingError(f"{waited}: {reason_of(error)}") from None


def _served(nodes: Nodes, timeout: timedelta) -> dist.Store | None:
    """Return the store if this node serves it."""
    if nodes.serves or (nodes.serves is None and _is_here(nodes.address, nodes.port)):
        try:
            return tcp_store(nodes.address, nodes.port, serves=True, timeout=timeout)
        except RuntimeError:
            if nodes.serves:
                raise
    return None  # another node does, maybe one of this machine that was faster


def _patient(store: dist.Store) -> dist.Store:
    store.set_timeout(timedelta(seconds=STORE_S))
    return store


def _is_here(address: str, port: int) -> bool:
    """Tell whether an address is this machine's and its port free: then this node serves the store."""
    for family, kind, protocol, _, place in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM):
        with socket.socket(family, kind, protocol) as sock, suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(place)
            return True
    return False


def _difference(notes: dist.Store, job: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Return (what differs from the job of the first node in the store, the line about it); ("", "") if nothing."""
    held = json.loads(notes.compare_set("job", "", json.dumps(job)))
    for name, value in job.items():
        if held.get(name) != value:
            return name, (
                f"{name} is {value!r}: the first node {where} has {held.get(name)!r}; must be the same on all nodes of "
                "a job, and the address or port another for each job"
            )
    return "", ""


@contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block after some seconds; torch lets a node that is one too many wait for ever."""

    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
