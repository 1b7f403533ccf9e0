"""Places in a job that Slurm and MPI started, from the variables that each documents."""

from __future__ import annotations

import os
import sys

import pytest

from megalign.__main__ import main
from megalign.runtime.discovery import adopt_launcher, allocation_end, first_machine, found, meet_by_mpi
from megalign.runtime.distributed import launched
from megalign.schema import UserError

SLURM = {
    "SLURM_JOB_ID": "4211",
    "SLURM_STEP_ID": "3",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}
PLACE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


def never(size: int) -> tuple[str, int]:
    raise AssertionError("no MPI here")


def test_tasks_of_a_step():
    place = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    # 20000 + (4211 + 3 * 101) % 10000
    meeting = {"MASTER_ADDR": "gpu07", "MASTER_PORT": "24514", "MEGALIGN_ATTEMPT": "slurm-4211.3-0"}
    assert found(SLURM, never) == {**place, **meeting}
    # 1009 ports on for each time that the job was requeued
    requeued = found({**SLURM, "SLURM_RESTART_COUNT": "2"}, never)
    assert requeued == {**place, **meeting, "MASTER_PORT": "26532", "MEGALIGN_ATTEMPT": "slurm-4211.3-2"}
    assert found({**SLURM, "CUDA_VISIBLE_DEVICES": "3"}, never)["LOCAL_RANK"] == "0"
    assert found({**SLURM, "CUDA_VISIBLE_DEVICES": "2,3"}, never)["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**SLURM, "RANK": "0"},  # torchrun below srun
        {key: value for key, value in SLURM.items() if "STEP" not in key},  # a batch script
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},  # one task, which may be a launcher
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
        {"PMI_SIZE": "4"},
    ],
)
def test_processes_that_are_not_adopted(environment):
    assert found(environment, never) == {}


@pytest.mark.parametrize("environment", [OPEN_MPI, HYDRA])
def test_ranks_of_mpi_meet_where_they_agreed(environment):
    assert found(environment, lambda size: ("10.0.0.7", 23456)) == {
        **PLACE,
        "MASTER_ADDR": "10.0.0.7",
        "MASTER_PORT": "23456",
    }
    assert found({**environment, "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}, never) == PLACE


def test_srun_goes_before_the_mpi_that_it_offers():
    assert found({**HYDRA, **SLURM}, never)["RANK"] == "5"


@pytest.mark.parametrize(
    ("machines", "first"),
    [
        ("gpu[03-06,9],login", "gpu03"),
        ("gpu[12,3-6]", "gpu12"),
        ("a,b", "a"),
        ("one.example.org", "one.example.org"),
        ("rack[1-2]node[05-06]-ib", "rack1node05-ib"),
        ("", ""),
    ],
)
def test_first_machine(machines, first):
    assert first_machine(machines) == first


def test_what_is_set_stays(monkeypatch):
    for name in [name for name in os.environ if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") or "MASTER" in name]:
        monkeypatch.delenv(name)
    own = {"MASTER_ADDR": "head", "MASTER_PORT": "5000", "WORLD_SIZE": "8"}
    expected = {**own, "RANK": "5", "LOCAL_RANK": "1"}
    names = [*expected, "MEGALIGN_ATTEMPT"]
    for name, value in {**dict.fromkeys(names, ""), **SLURM, **own}.items():
        monkeypatch.setenv(name, value)  # registers every name, so that the test leaves none behind
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    adopt_launcher(1.0)
    assert {name: os.environ[name] for name in expected} == expected
    assert launched() == (5, 8, 1)


def test_end_of_the_allocation(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    assert allocation_end() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1796025384")
    assert allocation_end() is None  # left in the environment of a shell that is in no job
    monkeypatch.setenv("SLURM_JOB_ID", "4211")
    assert allocation_end() == 1796025384.0
    monkeypatch.setenv("SLURM_JOB_END_TIME", "Unknown")
    assert allocation_end() is None


def test_mpi_without_mpi4py(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"MASTER_ADDR is missing: mpirun .* pip install mpi4py"):
        meet_by_mpi(2, 1.0, "--wait")


def test_option_of_the_deepspeed_launcher(capsys):
    assert main(["keys", "run.seed"]) == 0
    plain = capsys.readouterr().out
    assert main(["--local_rank=1", "keys", "run.seed"]) == 0
    assert capsys.readouterr().out == plain
