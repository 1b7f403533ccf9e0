"""Jobs in which one rank goes wrong in a chosen way, and how all their processes end."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalign.losses import LossConfig, LossOut, Pairing, Scores, Traits, loss
from megalign.runtime.distributed import free_port
from tests.support.processes import start_method

CALLS = itertools.count(1)  # of the loss in this process


class FaultConfig(LossConfig):
    fault: str = "none"
    rank: int = 1
    call: int = 3  # the call of the loss in which it happens

    def traits(self) -> Traits:
        return Traits(Pairing("single"))


@loss(FaultConfig)
def faulty(scores: Scores, cfg: FaultConfig) -> LossOut:
    """Mean negative log-prob of the responses; on one rank, once, a fault."""
    if next(CALLS) == cfg.call and os.environ.get("RANK", "0") == str(cfg.rank):
        go_wrong(cfg.fault)
    return LossOut(-scores.policy_S.sum() / scores.num_groups)


def go_wrong(fault: str) -> None:
    """Do as the fault's name says; `gil` sleeps without letting another thread run."""
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "gil":
        ctypes.PyDLL(None).sleep(600)
    elif fault == "raise":
        raise ValueError("the loss has had enough")
    elif fault == "abort":
        os.abort()
    elif fault == "sleep":
        time.sleep(600)
    elif fault == "slow":
        time.sleep(20)
    elif fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Ended:
    """Holds the exit codes of a job's ranks, what they wrote to standard error, and how long the job took."""

    codes: list[int | None]
    told: str
    seconds: float


def run_job(folder: Path, arguments: list[str], *, ranks: int = 2, within: float = 90.0, **environment: str) -> Ended:
    """Run `megalign ARGUMENTS` on ranks without a launcher; a code is None where the rank did not end in time."""
    context: Any = multiprocessing.get_context(start_method())
    told, port, began = folder / "told.txt", str(free_port()), time.monotonic()
    told.write_bytes(b"")
    meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environments = [
        {**os.environ, **environment, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)
    ]
    processes = [context.Process(target=_rank, args=(arguments, variables, told)) for variables in environments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.1, within - (time.monotonic() - began)))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return Ended(codes, told.read_text(), time.monotonic() - began)


def _rank(arguments: list[str], environment: dict[str, str], told: Path) -> None:
    from megalign.__main__ import main

    opened = os.open(told, os.O_WRONLY | os.O_APPEND)
    os.dup2(opened, 2)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os._exit(main(arguments))
