"""Joins the processes of a job; the only file that reads RANK, WORLD_SIZE and LOCAL_RANK."""

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
from typing import Any

import torch
import torch.distributed as dist

from megalign.runtime.cuda_device import cuda_device, refuse_shared_device
from megalign.runtime.ranks import host_group
from megalign.schema import UserError, reason_of

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
ATTEMPT = "MEGALIGN_ATTEMPT"  # names a start of a job by Slurm: only its own ranks meet under it
# Of collectives in a job with a watchdog, which ends it much earlier where no rank makes progress.
COLLECTIVE_S = 7 * 24 * 3600.0
PORT_S = 3.0  # to wait for a port that an outgoing connection briefly occupies
NAME_S = 5.0  # to wait for a name server that has no answer yet
LAST_WORD_S = 2.0  # that rank 0, which serves the store, waits so that others can read why the job ends


class MeetingError(Exception):
    """Says that the ranks could not connect; the message is shown as one line, and the exit code is 1."""


@dataclass(frozen=True, slots=True)
class World:
    """Identifies this process among all processes of the job."""

    rank: int
    size: int
    device: torch.device
    beat: Callable[[], None] = lambda: None  # tells the watchdog of progress; see runtime/heart.py

    @property
    def is_main(self) -> bool:
        """Tell whether this is rank 0, which writes the run directory."""
        return self.rank == 0


def launched() -> tuple[int, int, int]:
    """Return (rank, world size, local rank) as the launcher set them; (0, 1, 0) when run alone."""
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
    """Read a whole number from the environment; None where nothing is set."""
    text = os.environ.get(name, "").strip()
    if text and not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name} is {text!r}: must be a whole number >= 0, as torchrun sets it")
    return int(text) if text else None


@contextmanager
def process_group(
    *,
    timeout_s: float,
    limit: str = "watchdog.timeout_s",
    collective_s: float | None = None,
    before: Callable[[World, dist.Store], None] = lambda world, store: None,
) -> Iterator[World]:
    """Join the job's processes (NCCL on CUDA, gloo else) and leave them at the end.

    timeout_s: to wait for the other ranks to come. limit: what the user sets that time by. collective_s: after which
    every collective of the default group fails with the operation's name, `timeout_s` if None. before: called when all
    ranks have met in the store, before they connect to each other.
    """
    rank, size, _ = launched()
    on_cuda = torch.cuda.is_available()
    device = cuda_device(_number("LOCAL_RANK"), size, _number("LOCAL_WORLD_SIZE")) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    store = _store(rank, size, timeout, limit)
    if on_cuda and size > 1:
        refuse_shared_device(store, rank, device)
    before(World(rank, size, device), store)
    timeout = timedelta(seconds=timeout_s if collective_s is None else collective_s)
    try:
        # Told the device, NCCL connects at once, and a barrier does not guess it.
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if on_cuda else None,
        )
        host = dist.new_group(backend="gloo", timeout=timeout) if on_cuda else None
    except RuntimeError as error:
        raise MeetingError(f"rank {rank} of {size}: the ranks could not connect: {reason_of(error)}") from error
    given = {name for name in LAUNCHER_VARIABLES if name in os.environ}
    token = host_group.set(host)
    try:
        yield World(rank, size, device)
    finally:
        host_group.reset(token)
        for name in set(LAUNCHER_VARIABLES) - given:  # that `set_launcher_variables` added
            os.environ.pop(name, None)
        megatron_groups = sys.modules.get("megatron.core.parallel_state")
        if megatron_groups is not None:  # its globals would keep every group's threads alive
            megatron_groups.destroy_model_parallel()
        deepspeed_groups: Any = sys.modules.get("deepspeed.comm.comm")
        if deepspeed_groups is not None and deepspeed_groups.cdb is not None:  # a later job would use them
            deepspeed_groups.destroy_process_group()
            deepspeed_groups.cdb = None
        if dist.is_initialized():
            dist.destroy_process_group()


def set_launcher_variables(world: World) -> None:
    """Set the variables of a launcher that started this process without them, for libraries that read them.

    They are there until the ranks leave the job (`process_group`).
    """
    _, _, local_rank = launched()
    for name, value in zip(LAUNCHER_VARIABLES, (world.rank, world.size, local_rank), strict=True):
        os.environ.setdefault(name, str(value))


def raise_on_timeout() -> None:
    """Have NCCL's collectives raise after their time-out, where a job would be ended; before the ranks join."""
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"


def make_deterministic() -> None:
    """Have torch choose deterministic kernels for the rest of the process, and raise where it has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # likewise TransformerEngine's attention
    torch.use_deterministic_algorithms(True)


def _store(rank: int, size: int, timeout: timedelta, limit: str) -> dist.Store:
    """Return the rendezvous store, with keys prefixed by attempt: the agent's store keeps those of a dead one."""
    if size == 1:
        return dist.HashStore()
    address, port = _meeting_point(size)
    under_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not under_agent
    until = time.monotonic() + timeout.total_seconds()
    where = f"{timeout.total_seconds():g} s ({limit}) at MASTER_ADDR {address}, MASTER_PORT {port}"
    if serves:
        check_port(port)
    try:
        if not serves:
            await_server(address, port, until)
        tcp = tcp_store(address, port, serves=serves, timeout=timeout)
        # Another job's rank 0 may listen at this port: its ranks are not counted here, nor these there.
        job = os.environ.get(ATTEMPT, "job")
        store = dist.PrefixStore(f"{job}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)
        if not under_agent:
            _await_ranks(store, rank, size, until)
    except (RuntimeError, OSError) as error:
        raise MeetingError(f"rank {rank} of {size}: waited up to {where}: {reason_of(error)}") from None
    return store


def _await_ranks(store: dist.Store, rank: int, size: int, until: float) -> None:
    """Wait until every rank has joined the store; refuse a duplicate RANK or a different WORLD_SIZE."""
    problem = ""
    if store.add(f"number {rank}", 1) > 1:
        problem = f"RANK is {rank}: another process of the job has it too; must be different for each"
    elif (first := store.compare_set("size", "", str(size)).decode()) != str(size):
        problem = f"WORLD_SIZE is {size}: another rank has {first}; must be the same for all"
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


def tcp_store(address: str, port: int, *, serves: bool, timeout: timedelta) -> dist.Store:
    """Join rank 0's store, in a thread, because torch waits for ever if another kind of server answers."""
    results: list[dist.Store | Exception] = []

    def join() -> None:
        try:
            results.append(dist.TCPStore(address, port, is_master=serves, timeout=timeout, wait_for_workers=False))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(timeout.total_seconds() + 5.0)
    if not results:
        raise RuntimeError("what listens there does not answer as a rank of a job does")
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def _meeting_point(size: int) -> tuple[str, int]:
    """Return MASTER_ADDR and MASTER_PORT; UserError unless the address resolves."""
    address, port = os.environ.get("MASTER_ADDR", "").strip(), _number("MASTER_PORT")
    if not address:
        raise UserError(f"MASTER_ADDR is missing: WORLD_SIZE is {size}; must be the host name or address of rank 0")
    if port is None:
        raise UserError(f"MASTER_PORT is missing: WORLD_SIZE is {size}; must be a free port of rank 0's machine")
    if not 0 < port < 65536:
        raise UserError(f"MASTER_PORT is {port}: must be 1 to 65535")
    check_address(address, port)
    return address, port


def check_address(address: str, port: int, *, name: str = "MASTER_ADDR") -> None:
    """Refuse an address that does not resolve."""
    until = time.monotonic() + NAME_S
    while True:
        try:
            socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:
            again = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
            if not again or time.monotonic() > until:
                why = error.strerror if isinstance(error, OSError) else error
                raise UserError(
                    f"{name} is {address!r}: not resolved ({why}); must be the host name or address of rank 0"
                ) from None
        time.sleep(0.5)


def check_port(port: int) -> None:
    """Refuse a port that rank 0 cannot listen on."""
    until = time.monotonic() + PORT_S
    while (problem := _bind_problem(port)) is not None:
        busy = problem.errno == errno.EADDRINUSE
        if not busy or time.monotonic() > until:
            why = "another process uses it" if busy else problem.strerror
            raise UserError(f"MASTER_PORT is {port}: {why}; must be a free port of rank 0's machine")
        time.sleep(0.1)


def _bind_problem(port: int) -> OSError | None:
    """Return the error of listening on a port now; None if that works."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
        except OSError as error:
            return error
    return None


def await_server(address: str, port: int, until: float, *, who: str = "rank 0") -> None:
    """Wait until the store's server listens; torch's own waiting prints a page of warnings."""
    while True:
        try:
            if _listens(address, port, timeout_s=min(5.0, max(0.1, until - time.monotonic()))):
                return
        except OSError as error:
            if time.monotonic() > until:
                raise RuntimeError(
                    f"{who} does not answer ({error.strerror or error}); must be started there and be reachable"
                ) from None
        time.sleep(0.2)


def _listens(address: str, port: int, *, timeout_s: float) -> bool:
    """Connect to a port; OSError where that fails."""
    with socket.create_connection((address, port), timeout=timeout_s) as sock:
        # Where nothing listens yet, a connection may get the port as its own source port and connect to itself.
        return bool(sock.getsockname() != sock.getpeername())


def free_port() -> int:
    """Return an unused TCP port, below those that the system gives to outgoing connections."""
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
