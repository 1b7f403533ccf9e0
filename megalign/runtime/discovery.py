"""Finds a process's place in a job that Slurm or MPI started, and sets the variables that torchrun sets."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from megalign.runtime.distributed import ATTEMPT, MeetingError, free_port
from megalign.runtime.mpi_meeting import ANSWER
from megalign.runtime.nodes import LOOPBACK, address_towards
from megalign.runtime.parent import PARENT
from megalign.schema import UserError

# (rank, number of ranks, rank on its machine) as Open MPI and MPICH's Hydra name them.
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
FIRST_PORT, NUM_PORTS = 20000, 10000  # below the ports that a system gives to outgoing connections

Meet = Callable[[int], tuple[str, int]]  # of the number of ranks


def adopt_launcher(timeout_s: float, *, limit: str = "watchdog.timeout_s") -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT if Slurm or MPI started several processes.

    What is set already stays. Nothing is set where RANK is, or where this process runs alone. timeout_s: how long to
    wait for the other ranks of MPI; limit: what sets it.
    """
    for name, value in found(os.environ, lambda size: meet_by_mpi(size, timeout_s, limit)).items():
        os.environ.setdefault(name, value)


def found(environment: Mapping[str, str], meet: Meet) -> dict[str, str]:
    """Return torchrun's variables of a process that Slurm or MPI started; empty for other processes.

    meet: called on all ranks of an MPI job without MASTER_ADDR or MASTER_PORT, to agree on them.
    """
    if environment.get("RANK"):
        return {}
    # Only tasks of a step have SLURM_STEP_ID: a batch script has rank 0 and its allocation's size too, but runs alone.
    if environment.get("SLURM_STEP_ID") and _size(environment, SLURM) > 1:
        return {**_ranks(environment, SLURM), **_slurm_meeting(environment)}
    for names in MPI:
        if _size(environment, names) > 1:
            ranks = _ranks(environment, names)
            if environment.get("MASTER_ADDR") and environment.get("MASTER_PORT"):
                return ranks
            address, port = meet(_size(environment, names))
            return {**ranks, "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    return {}


def allocation_end() -> float | None:
    """Return when Slurm ends this process's job, in seconds since the epoch; None where it says nothing."""
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdecimal() and os.environ.get("SLURM_JOB_ID") else None


def _size(environment: Mapping[str, str], names: Sequence[str]) -> int:
    text = environment.get(names[1], "")
    return int(text) if environment.get(names[0]) and text.isdecimal() else 0


def _ranks(environment: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """Return the values of a launcher's three variables under torchrun's names."""
    values = zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), (environment.get(name) for name in names), strict=True)
    ranks = {name: value for name, value in values if value is not None}
    devices = environment.get("CUDA_VISIBLE_DEVICES", "")
    if devices and "," not in devices:
        ranks["LOCAL_RANK"] = "0"  # the launcher has given each process one device, which it sees as its first
    return ranks


def _slurm_meeting(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the first machine of a step, a port that the step's number gives, and a name for this attempt.

    Two jobs of one machine may have the same port, and a requeued job that of an attempt which has not quite ended.
    """
    machines = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, attempt = (int(re.sub(r"\D", "", environment.get(name, "")) or 0) for name in names)
    port = FIRST_PORT + (job + 101 * step + 1009 * attempt) % NUM_PORTS
    return {
        "MASTER_ADDR": first_machine(machines),
        "MASTER_PORT": str(port),
        ATTEMPT: f"slurm-{job}.{step}-{attempt}",
    }


def first_machine(machines: str) -> str:
    """Return the first host of a list as Slurm writes it: `gpu[03-06,9],login` is gpu03."""
    first = re.match(r"[^\[,]+(?:\[[^\]]*\][^\[,]*)*", machines)
    return "" if first is None else re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def meet_by_mpi(size: int, timeout_s: float, limit: str) -> tuple[str, int]:
    """Return an address of rank 0's machine and a port that is free there; called on every rank of an MPI job."""
    if importlib.util.find_spec("mpi4py") is None:
        raise UserError(
            "MASTER_ADDR is missing: mpirun started several processes; must be set with MASTER_PORT on all of them "
            "(mpirun -x with Open MPI, -genv with MPICH), or mpi4py be installed: pip install mpi4py"
        )
    word = f"{_meeting_address()} {free_port()}"
    command = [sys.executable, "-m", "megalign.runtime.mpi_meeting", str(size), word]
    try:
        # The files that mpirun opened for this process stay open in the other, which MPI needs.
        environment = {**os.environ, PARENT: str(os.getpid())}
        met = subprocess.run(
            command, env=environment, timeout=timeout_s, capture_output=True, text=True, close_fds=False
        )
    except subprocess.TimeoutExpired:
        raise MeetingError(
            f"waited {timeout_s:g} s ({limit}) for the other ranks in MPI: one of {size} has ended before, "
            "or was not started"
        ) from None
    answers = [line.removeprefix(ANSWER) for line in met.stdout.splitlines() if line.startswith(ANSWER)]
    if not answers:
        said = [line for line in met.stderr.splitlines() if line.strip(" -=")]
        why = said[-1].strip() if said else f"it ended with exit code {met.returncode}"
        raise MeetingError(f"the ranks could not meet by MPI: {why}")
    address, port = answers[0].split()
    return address, int(port)


def _meeting_address() -> str:
    """Return this machine's address for other ranks, in the network that the user has named if there are several."""
    return collective_address(on_cuda=False) if os.environ.get("GLOO_SOCKET_IFNAME") else own_address()


def collective_address(*, on_cuda: bool) -> str:
    """Return the address at which NCCL or gloo will have this process listen for other ranks.

    It is that of the interface which NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names; without one, gloo takes what this
    machine's name resolves to, and NCCL a network that is not the loopback.
    """
    import psutil  # torch's processes need it anyway; finding a launcher does not

    wanted = os.environ.get("NCCL_SOCKET_IFNAME" if on_cuda else "GLOO_SOCKET_IFNAME", "").split(",")[0]
    if wanted and not wanted.startswith("^"):
        exact = wanted.startswith("=")
        for interface, addresses in sorted(psutil.net_if_addrs().items()):
            if interface == wanted[1:] if exact else interface.startswith(wanted):
                return next((held.address for held in addresses if held.family == socket.AF_INET), "")
        raise UserError(f"network interface {wanted!r} is not there; must be one of {', '.join(psutil.net_if_addrs())}")
    if on_cuda:
        return own_address()
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return LOOPBACK  # as gloo does


def own_address() -> str:
    """Return the address by which other machines reach this one."""
    import psutil

    address = address_towards("10.255.255.255", 1)
    if address is not None:
        return address
    others = [held for name, held in psutil.net_if_addrs().items() if name != "lo"]  # no route leads everywhere
    found = [one.address for held in others for one in held if one.family == socket.AF_INET]
    return found[0] if found else LOOPBACK
