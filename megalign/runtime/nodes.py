"""Reads from the environment how many machines (nodes) a job has, which one this is, and where they meet."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from megalign.schema import UserError

LOOPBACK = "127.0.0.1"
MASTER_PORT, RDZV_PORT = 29500, 29400  # torchrun's defaults
ENDPOINT = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s:\[\]/]+))(?::(?P<port>[0-9]+))?")


@dataclass(frozen=True, slots=True)
class Nodes:
    """Describes the machines of a job and the store by which their agents agree.

    serves: whether this node holds the store; None where the address says it. where: names the variables in messages.
    """

    count: int = 1
    rank: int | None = 0
    address: str = LOOPBACK
    port: int = 0
    serves: bool | None = True
    where: str = "on this machine"
    job: str = "megalign"
    max_restarts: int = 0
    timeout_s: int = 600

    @property
    def address_name(self) -> str:
        """Return the variable that gave the address."""
        return "RDZV_ENDPOINT" if self.serves is None else "MASTER_ADDR"

    @property
    def name(self) -> str:
        """Return how messages name this node, different for each."""
        return f"{socket.gethostname()} (process {os.getpid()})" if self.rank is None else f"node {self.rank}"


def nodes_of(environment: Mapping[str, str]) -> Nodes:
    """Return what NNODES and its companions say; UserError for values that do not fit together."""
    given = {name: value.strip() for name, value in environment.items()}
    count = _number(given, "NNODES", 1, at_least=1)
    rank = _number(given, "NODE_RANK", None)
    if rank is not None and rank >= count:
        raise UserError(f"NODE_RANK is {rank}: must be below NNODES, {count}")
    alone = LOOPBACK, 0, True, "on this machine"
    address, port, serves, where = alone if count == 1 else _meeting_point(given, count, rank)
    job = given.get("RDZV_ID") or "megalign"
    if not re.fullmatch(r"[\w.-]+", job):
        raise UserError(f"RDZV_ID is {job!r}: must be of letters, digits, '_', '-' and '.'")
    return Nodes(
        count=count,
        rank=0 if count == 1 else rank,
        address=address,
        port=port,
        serves=serves,
        where=where,
        job=job,
        max_restarts=_number(given, "MAX_RESTARTS", 0),
        timeout_s=_number(given, "RDZV_TIMEOUT", 600, at_least=1),
    )


def address_towards(address: str, port: int) -> str | None:
    """Return this machine's address in the network that leads to another address; None where no network does."""
    for family, _, _, _, place in socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM):
        with socket.socket(family, socket.SOCK_DGRAM) as sock, suppress(OSError):
            sock.connect(place)  # sends nothing; it only chooses the interface
            return str(sock.getsockname()[0])
    return None


def _number(given: Mapping[str, str], name: str, default: int | None, *, at_least: int = 0) -> int:
    """Read a whole number; an empty value is the default, which the caller knows to be None or not."""
    text = given.get(name, "")
    if not text:
        return default  # type: ignore[return-value]
    if not (text.isascii() and text.isdecimal() and int(text) >= at_least):
        fixed = "; a job keeps its number of nodes, and a new launch with another one resumes it" if ":" in text else ""
        raise UserError(f"{name} is {text!r}: must be a whole number >= {at_least}{fixed}")
    return int(text)


def _meeting_point(given: Mapping[str, str], count: int, rank: int | None) -> tuple[str, int, bool | None, str]:
    """Return (address, port, whether this node serves the store, the variables that say so) of several nodes."""
    endpoint = given.get("RDZV_ENDPOINT", "")
    if endpoint:
        match = ENDPOINT.fullmatch(endpoint)
        port = int(match["port"] or RDZV_PORT) if match else 0
        if match is None or not 0 < port < 65536:
            raise UserError(f"RDZV_ENDPOINT is {endpoint!r}: must be host:port, the same on all nodes")
        return match["six"] or match["host"], port, None, f"at RDZV_ENDPOINT {endpoint}"
    address = given.get("MASTER_ADDR", "")
    if not address:
        raise UserError(
            f"MASTER_ADDR is missing: NNODES is {count}; must be the host name or address of NODE_RANK 0's machine, or "
            "RDZV_ENDPOINT be host:port"
        )
    if rank is None:
        raise UserError(f"NODE_RANK is missing: NNODES is {count}; must be this node's number, 0 to {count - 1}")
    port = _number(given, "MASTER_PORT", MASTER_PORT, at_least=1)
    if port > 65535:
        raise UserError(f"MASTER_PORT is {port}: must be 1 to 65535")
    return address, port, rank == 0, f"at MASTER_ADDR {address}, MASTER_PORT {port}"
