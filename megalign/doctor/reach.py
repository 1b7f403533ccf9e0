"""Checks that every rank reaches the others by TCP, before collectives would wait for a port that is closed.

The same connections compare the ranks' clocks with rank 0's (Cristian's algorithm, Distributed Computing 3, 1989).
"""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from megalign.doctor.finding import Finding, State, listed, where
from megalign.doctor.visit import Check, Visit
from megalign.runtime.discovery import collective_address
from megalign.runtime.ranks import by_value
from megalign.schema import reason_of

CONNECT_S = 5.0  # for one connection; within a cluster it takes milliseconds
ALL_PAIRS = 64  # ranks; of more, each reaches the first of every host and its neighbour
PADDING = 1 << 16  # bytes that follow an answer: more than a packet, and packets that are too large are lost on the way
TRIES = 5  # readings of rank 0's clock, of which the one with the shortest way counts
SKEW_WARN_S, SKEW_FAIL_S = 1.0, 30.0


class Unreachable(Exception):
    """Ends the visit before all ranks connect to each other: they would wait for those that cannot be reached."""


def reach_checks() -> list[Check]:
    """Return the checks of reachability (which reads the clocks too), of clocks and of network interfaces."""
    offsets: list[float] = []  # of this rank's clock, from one check to the next

    def read(visit: Visit) -> list[list[Any]]:
        visit.closed = True  # on all ranks, where the check fails on one
        problems, offset = _reach(visit)
        offsets.append(offset)
        # A finding of rank 0's alone would not keep the others from connecting.
        visit.closed = any(visit.share("reachability", bool(problems)))
        return problems

    return [
        Check("reachability", read, _judge_reach),
        Check("clocks", lambda visit: offsets[0] if offsets else None, judge_clocks),
        Check("interfaces", _interface, judge_interfaces),
    ]


def _reach(visit: Visit) -> tuple[list[list[Any]], float]:
    """Connect to the others; return [[rank, address, reason]] of those that do not answer, and this clock's offset."""
    with _answering(visit.world.rank) as port:
        # An interface that is not there raises here, and ends the check on all ranks.
        address = collective_address(on_cuda=visit.world.device.type == "cuda")
        known = visit.share("addresses", [address, port])
        hosts, own = visit.hosts, visit.hosts[visit.world.rank]
        chosen = _partners(visit.world.rank, hosts)
        with ThreadPoolExecutor(min(16, max(1, len(chosen)))) as pool:
            problems = list(
                pool.map(lambda other: _problem(other, *known[other], elsewhere=hosts[other] != own), chosen)
            )
        offset = 0.0 if visit.world.is_main else _offset(*known[0])
        visit.share("ends of connecting", None)  # until then each answers the others
    found = [
        [other, ":".join(map(str, known[other])), text] for other, text in zip(chosen, problems, strict=True) if text
    ]
    return found, offset


def _partners(rank: int, hosts: Sequence[str]) -> list[int]:
    """Return the ranks that a rank connects to."""
    others = [other for other in range(len(hosts)) if other != rank]
    if len(hosts) <= ALL_PAIRS:
        return others
    firsts = {host: other for other, host in reversed(list(enumerate(hosts)))}
    return sorted({*firsts.values(), (rank + 1) % len(hosts)} - {rank})


class _Server(socketserver.ThreadingTCPServer):
    """Answers each connection with this rank's number and clock, and padding."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(self, rank: int) -> None:
        super().__init__(("", 0), socketserver.BaseRequestHandler)
        self.rank = rank

    def finish_request(self, request: Any, client_address: Any) -> None:
        with suppress(OSError):  # some only ask for the clock and hang up
            request.settimeout(CONNECT_S)
            request.sendall(f"{self.rank} {time.time()!r}\n".encode())
            request.sendall(bytes(PADDING))  # apart, because a large packet may be lost


@contextmanager
def _answering(rank: int) -> Iterator[int]:
    """Answer connections inside the block; yield the port."""
    with _Server(rank) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


def _ask(address: str, port: int, *, whole: bool = False) -> tuple[int, float, int]:
    """Return the number and the clock of the rank that answers, and how many bytes followed, if the whole is asked."""
    with socket.create_connection((address, port), timeout=CONNECT_S) as connection:
        head = b""
        while b"\n" not in head:  # not through a file, which would take the padding into its buffer
            head += connection.recv(256) or b"\n"
        line, _, rest = head.partition(b"\n")
        number, clock = line.split()
        arrived = len(rest)
        with suppress(TimeoutError):
            while whole and (part := connection.recv(PADDING)):
                arrived += len(part)
        return int(number), float(clock), arrived


def _problem(rank: int, address: str, port: int, *, elsewhere: bool) -> str:
    """Return why a rank cannot be reached at its address; empty where it answers. elsewhere: it is on another host."""
    if elsewhere and address.startswith("127."):
        return "that is the loopback address, which the machine's name resolves to there"
    try:
        number, _, arrived = _ask(address, port, whole=True)
    except (OSError, ValueError) as error:
        return "timed out" if isinstance(error, TimeoutError) else reason_of(error)
    if number != rank:
        return f"rank {number} answers there"
    lost = "large packets may be lost on the way (MTU)"
    return "" if arrived == PADDING else f"of {PADDING} bytes {arrived} arrived: {lost}"


def _offset(address: str, port: int) -> float:
    """Return by how many seconds this rank's clock is ahead of rank 0's; 0 where rank 0 does not answer."""
    readings = []
    for _ in range(TRIES):
        sent = time.time()
        try:
            _, clock, _ = _ask(address, port)
        except (OSError, ValueError):
            continue
        received = time.time()
        readings.append((received - sent, (sent + received) / 2 - clock))
    return min(readings)[1] if readings else 0.0


def _judge_reach(visit: Visit, answers: Sequence[list[list[Any]]]) -> list[Finding]:
    size, hosts = visit.world.size, visit.hosts
    if size == 1:
        return [Finding("reachability", "ok", f"one rank on {hosts[0]}")]
    pairs: dict[tuple[str, str, str], list[list[int]]] = {}
    for rank, problems in enumerate(answers):
        for other, address, reason in problems:
            found = pairs.setdefault((hosts[rank], hosts[other], reason), [[], [], []])
            found[0].append(rank)
            found[1].append(other)
            found[2].append(address)
    findings = [
        Finding(
            "reachability",
            "fail",
            f"{where(set(froms), hosts)} cannot reach {where(set(tos), hosts)} at {addresses[0]}: {reason}",
            "open all TCP ports between machines, or name the right network: NET_INTERFACE of launch/environment.sh",
        )
        for (_, _, reason), (froms, tos, addresses) in pairs.items()
    ]
    if findings:
        return findings
    named = ", ".join(f"{host} ({len(ranks)})" for host, ranks in list(by_value(hosts).items())[:8])
    return [Finding("reachability", "ok", f"{size} ranks reach each other; hosts: {named}")]


def judge_clocks(visit: Visit, offsets: Sequence[float | None]) -> list[Finding]:
    """Return findings on clocks; offsets: seconds by which each rank's clock is ahead of rank 0's, if that is known."""
    known = [offset for offset in offsets if offset is not None]
    if len(known) < len(offsets):
        return []  # what kept ranks from reaching each other is the finding
    worst = max(map(abs, known))
    if worst <= SKEW_WARN_S:
        return [Finding("clocks", "ok", f"at most {worst * 1000:.0f} ms from rank 0's")]
    state: State = "fail" if worst > SKEW_FAIL_S else "warn"
    late = {rank: offset for rank, offset in enumerate(known) if abs(offset) > SKEW_WARN_S}
    ahead = "; ".join(f"{where([rank], visit.hosts)}: {offset:+.1f} s" for rank, offset in list(late.items())[:8])
    advice = (
        "synchronise the machines' clocks (chrony, ntpd): a failing rank's status is told from an older one by time"
    )
    return [Finding("clocks", state, f"not rank 0's time: {ahead}", advice)]


def _interface(visit: Visit) -> dict[str, Any]:
    """Return name, speed in Mb/s (0: unknown) and packet size of the interface that collectives use on this rank."""
    if visit.closed:
        return {}
    address = collective_address(on_cuda=visit.world.device.type == "cuda")
    for name, held in psutil.net_if_addrs().items():
        if any(each.address == address for each in held):
            stats = psutil.net_if_stats()[name]
            return {"name": name, "speed": stats.speed, "mtu": stats.mtu}
    return {"name": "unknown", "speed": 0, "mtu": 0}


def judge_interfaces(visit: Visit, answers: Sequence[dict[str, Any]]) -> list[Finding]:
    """Return findings on interfaces whose packets or links differ between machines."""
    hosts, findings = visit.hosts, []
    if visit.closed:
        return []
    if len(set(hosts)) == 1:
        return [Finding("interfaces", "ok", f"{answers[0]['name']}, within one machine")]
    packets = [held["mtu"] for held in answers]
    if len(set(packets)) > 1:
        found = f"largest packets (MTU) differ: {listed(packets, hosts)}"
        advice = "set one MTU on all machines: TCP uses the smaller one, and other protocols may lose packets"
        findings.append(Finding("interfaces", "warn", found, advice))
    speeds = [f"{held['speed']} Mb/s" for held in answers]
    if len(set(speeds)) > 1:
        found = f"links have different speeds: {listed(speeds, hosts)}"
        findings.append(Finding("interfaces", "warn", found, "look at cables and ports: all wait for the slowest link"))
    names = listed([f"{held['name']} {speed}" for held, speed in zip(answers, speeds, strict=True)], hosts)
    return findings or [Finding("interfaces", "ok", names)]
