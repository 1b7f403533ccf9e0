"""Process start-up: the one place that reads RANK and its like."""

from __future__ import annotations

import errno
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megalign.schema import UserError, reason_of

Result = TypeVar("Result")
PORT_S = 3.0  # for a port that some process's outgoing connection has for a moment
NAME_S = 5.0  # for a name server that has no answer yet
LAST_WORD_S = 2.0  # that rank 0, whose store it is, stays for the others to read why the job ends


class MeetingError(Exception):
    """Ranks did not meet: the message is the one line shown, and the exit code is 1."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def launched() -> tuple[int, int, int]:
    """(rank, world size, local rank) as the launcher set them; (0, 1, 0) when run alone."""
    rank, size, local_rank = _number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK")
    if size is None and rank:
        raise UserError(f"WORLD_SIZE is missing: RANK is {rank}; must be the number of processes")
    if size == 0:
        raise UserError("WORLD_SIZE is '0': must be the number of processes, 1 or more")
    if size is not None and size > 1 and rank is None:
        raise UserError(f"RANK is missing: WORLD_SIZE is {size}; must be this process's number, 0 to {size - 1}")
    if rank is not None and rank >= (size or 1):
        raise UserError(f"RANK is {rank}: must be below WORLD_SIZE {size or 1}")
    return rank or 0, size or 1, local_rank or 0


def _number(name: str) -> int | None:
    """A whole number from the environment; None where nothing is set."""
    text = os.environ.get(name, "").strip()
    if text and not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name} is {text!r}: must be a whole number >= 0, as torchrun sets it")
    return int(text) if text else None


@contextmanager
def process_group(*, timeout_s: float) -> Iterator[World]:
    """Join the job's processes (NCCL on CUDA, gloo else) and leave them at the end.

    Every collective of the default group fails after `timeout_s` seconds with the operation's name.
    """
    rank, size, local_rank = launched()
    on_cuda = torch.cuda.is_available()
    if on_cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"LOCAL_RANK is {local_rank}: must be below the {torch.cuda.device_count()} CUDA devices here")
    if on_cuda and size > 1 and torch.cuda.device_count() > 1 and _number("LOCAL_RANK") is None:
        raise UserError(f"LOCAL_RANK is missing: WORLD_SIZE is {size}; must be the CUDA device of this process")
    device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    store = _store(rank, size, timeout)
    try:
        dist.init_process_group("nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:
        raise MeetingError(f"rank {rank} of {size}: the ranks could not connect: {reason_of(error)}") from error
    try:
        yield World(rank, size, local_rank, device)
    finally:
        megatron_groups = sys.modules.get("megatron.core.parallel_state")
        if megatron_groups is not None:  # its globals would keep every group's threads alive
            megatron_groups.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()


def make_deterministic() -> None:
    """Have torch choose deterministic kernels for the rest of the process, and raise where it has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    torch.use_deterministic_algorithms(True)


def _store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The rendezvous store; each attempt has names of its own, because a dead one's keys stay in the agent's store."""
    if size == 1:
        return dist.HashStore()
    address, port = _meeting_point(size)
    under_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not under_agent
    until = time.monotonic() + timeout.total_seconds()
    where = f"{timeout.total_seconds():g} s (watchdog.timeout_s) at MASTER_ADDR {address}, MASTER_PORT {port}"
    if serves:
        _check_port(port)
    try:
        if not serves:
            _await_server(address, port, until)
        tcp = _tcp_store(address, port, serves=serves, timeout=timeout)
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)
        if not under_agent:
            _await_ranks(store, rank, size, until)
    except (RuntimeError, OSError) as error:
        raise MeetingError(f"rank {rank} of {size}: waited up to {where}: {reason_of(error)}") from None
    return store


def _await_ranks(store: dist.Store, rank: int, size: int, until: float) -> None:
    """Wait until every rank has come to the store; refuse a second one of a number, or of another world size."""
    problem = ""
    if store.add(f"number {rank}", 1) > 1:
        problem = f"RANK is {rank}: another process of the job has it too; must be different for each"
    elif (found := store.compare_set("size", "", str(size)).decode()) != str(size):
        problem = f"WORLD_SIZE is {size}: another rank has {found}; must be the same for all"
    if problem:
        _end_meeting(store, rank, problem)
        raise UserError(problem)
    store.set(f"rank {rank}", "came")
    store.add("came", 1)
    pause = 0.05
    while store.add("came", 0) < size:
        if store.check(["end"]):
            raise RuntimeError(store.get("end").decode())
        if time.monotonic() > until:
            missing = [other for other in range(size) if not store.check([f"rank {other}"])]
            shown = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            problem = (
                f"{size - len(missing)} of {size} ranks came, missing: {shown}; all must be started with the same "
                "MASTER_ADDR, MASTER_PORT and WORLD_SIZE"
            )
            _end_meeting(store, rank, problem)
            raise RuntimeError(problem)
        time.sleep(pause)
        pause = min(LAST_WORD_S / 4, pause * 1.5)


def _end_meeting(store: dist.Store, rank: int, problem: str) -> None:
    """Tell the ranks that wait in the store why the job ends."""
    store.set("end", problem)
    if rank == 0:
        time.sleep(LAST_WORD_S)


def _tcp_store(address: str, port: int, *, serves: bool, timeout: timedelta) -> dist.Store:
    """Join the store of rank 0; in a thread, because torch waits for ever for a server that is none of its own."""
    found: list[dist.Store | Exception] = []

    def join() -> None:
        try:
            found.append(dist.TCPStore(address, port, is_master=serves, timeout=timeout, wait_for_workers=False))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(timeout.total_seconds() + 5.0)
    if not found:
        raise RuntimeError("what listens there does not answer as a rank of a job does")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _meeting_point(size: int) -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT, the first of which names a machine."""
    address, port = os.environ.get("MASTER_ADDR", "").strip(), _number("MASTER_PORT")
    if not address:
        raise UserError(f"MASTER_ADDR is missing: WORLD_SIZE is {size}; must be the host name or address of rank 0")
    if port is None:
        raise UserError(f"MASTER_PORT is missing: WORLD_SIZE is {size}; must be a free port of rank 0's machine")
    if not 0 < port < 65536:
        raise UserError(f"MASTER_PORT is {port}: must be 1 to 65535")
    until = time.monotonic() + NAME_S
    while True:
        try:
            socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            return address, port
        except (OSError, UnicodeError) as error:
            again = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
            if not again or time.monotonic() > until:
                why = error.strerror if isinstance(error, OSError) else error
                raise UserError(
                    f"MASTER_ADDR is {address!r}: not resolved ({why}); must be the host name or address of rank 0"
                ) from None
        time.sleep(0.5)


def _check_port(port: int) -> None:
    """Refuse a port that rank 0 cannot listen on."""
    until = time.monotonic() + PORT_S
    while True:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("", port))
                return
            except OSError as error:
                busy = error.errno == errno.EADDRINUSE
                if not busy or time.monotonic() > until:
                    why = "another process uses it" if busy else error.strerror
                    message = f"MASTER_PORT is {port}: {why}; must be a free port of rank 0's machine"
                    raise UserError(message) from None
        time.sleep(0.1)


def _await_server(address: str, port: int, until: float) -> None:
    """Wait until rank 0, or torchrun's agent, listens; torch's own waiting prints a page of warnings."""
    while True:
        try:
            limit = min(5.0, max(0.1, until - time.monotonic()))
            with socket.create_connection((address, port), timeout=limit) as sock:
                # Where nobody listens yet, a connection may be given its own port as its source, and meet itself.
                if sock.getsockname() != sock.getpeername():
                    return
        except OSError as error:
            if time.monotonic() > until:
                raise RuntimeError(
                    f"rank 0 does not answer ({error.strerror or error}); must be started there and be reachable"
                ) from None
        time.sleep(0.2)


def free_port() -> int:
    """A TCP port nobody uses, below those that the system gives to outgoing connections."""
    draw = random.SystemRandom()
    while True:
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", draw.randrange(15000, 32768)))
            except OSError:
                continue
            return int(sock.getsockname()[1])


def spawn(function: Callable[..., None], num_processes: int, *args: object) -> None:
    """Run `function(*args)` in fresh processes joined as a job; raise what the first failing one raised."""
    torch.multiprocessing.spawn(_entry, (function, num_processes, free_port(), args), nprocs=num_processes)


def _entry(rank: int, function: Callable[..., None], size: int, port: int, args: tuple[object, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    function(*args)
