"""Jobs in which one rank goes wrong in a chosen way, and how all their processes end."""

from __future__ import annotations

import ctypes
import gc
import itertools
import multiprocessing
import os
import signal
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalign.engines.megatron.engine import MegatronEngine
from megalign.losses import LossConfig, LossOut, Pairing, Scores, Traits, loss
from megalign.runtime.distributed import free_port
from tests.support.processes import start_method

CALLS = itertools.count(1)  # of the loss in this process


class FaultConfig(LossConfig):
    fault: str = "none"
    folder: str = ""  # the run's, of the faults of saving
    rank: int = 1
    call: int = 3  # the call of the loss in which it happens

    def traits(self) -> Traits:
        return Traits(Pairing("single"))


@loss(FaultConfig)
def faulty(scores: Scores, cfg: FaultConfig) -> LossOut:
    """Mean negative log-prob of the responses; on one rank, once, a fault."""
    if next(CALLS) == cfg.call and os.environ.get("RANK", "0") == str(cfg.rank):
        go_wrong(cfg.fault, cfg.folder)
    return LossOut(-scores.policy_S.sum() / scores.num_groups)


def go_wrong(fault: str, folder: str = "") -> None:
    """Do as the fault's name says; `gil` sleeps without letting another thread run, `ulp` changes a bit of a norm."""
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
    elif fault == "sleep_and_stop":
        time.sleep(9)
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "slow":
        time.sleep(20)
    elif fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "fill":
        fill(Path(folder))
    elif fault == "die_while_saving":
        threading.Thread(target=die_while_saving, args=(Path(folder),), daemon=True).start()
    elif fault == "ulp":
        engine = next(each for each in gc.get_objects() if isinstance(each, MegatronEngine) and each.optimizer)
        norm = engine.shard.named_parameters()["decoder.layers.1.input_layernorm.weight"]
        norm.data[:1].view(torch.int32).add_(1)


def fill(folder: Path) -> None:
    """Write zeros until the disk is full."""
    with suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def die_while_saving(folder: Path) -> None:
    """Kill this process as soon as a checkpoint is being written."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if any(folder.glob("checkpoints/.step_*")):
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Ended:
    """Holds the exit codes of a job's ranks, what they wrote to standard error, and how long the job took."""

    codes: list[int | None]
    told: str
    seconds: float


def run_job(folder: Path, arguments: list[str], *, ranks: int = 2, within: float = 200.0, **environment: str) -> Ended:
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
