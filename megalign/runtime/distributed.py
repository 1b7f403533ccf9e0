"""Process start-up: the one place that reads RANK and its like."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


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
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return rank, size, int(os.environ.get("LOCAL_RANK", 0))


@contextmanager
def process_group(*, timeout_s: float) -> Iterator[World]:
    """Join the job's processes (NCCL on CUDA, gloo else) and leave them at the end.

    Every collective of the default group fails after `timeout_s` seconds with the operation's name.
    """
    rank, size, local_rank = launched()
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(
        "nccl" if on_cuda else "gloo", store=_store(rank, size, timeout), rank=rank, world_size=size, timeout=timeout
    )
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
    if size == 1 and "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    under_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    tcp = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=rank == 0 and not under_agent,
        timeout=timeout,
    )
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
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
