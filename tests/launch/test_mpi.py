"""launch/mpirun.sh and launch/deepspeed.sh give the numbers of launch/torchrun.sh and the job's own exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from megalign.runtime.distributed import free_port
from tests.support.mpi import KINDS, inside, two_hosts, wheels
from tests.support.tiny_jobs import (
    ROOT,
    checkpoint_steps,
    metrics,
    numbers,
    records,
    status,
    write_config,
    write_lines,
    write_model,
)

TIMEOUT_S = 400.0  # ends only what hangs: far more than a job of a few steps takes on a busy machine
MEET = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}  # so that mpi4py is not needed
SPLIT = ("parallel.tensor=2",)
# Read by every Python of a job: each rank writes down where it ran, and ends early where a variable names it.
PLACES = """
import atexit, os, socket, sys
here = os.path.dirname(__file__)
rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", ""))
if sys.orig_argv[2:5] == ["-m", "megalign", "train"] and rank and rank == os.environ.get("ENDS_EARLY"):
    os._exit(3)

@atexit.register
def note():
    if "RANK" in os.environ:
        words = [socket.gethostname(), os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]]
        with open(f"{here}/place{os.environ['RANK']}", "w") as file:
            file.write(" ".join(words))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, records, and the job that every test runs in a run directory of its own."""
    folder = tmp_path_factory.mktemp("mpi")
    write_model(folder / "model")
    write_lines(folder / "data.jsonl", records("samples"))
    write_config(folder)
    return folder


@pytest.fixture(scope="module")
def installed(request):
    """The folder that keeps the wheels between runs of the tests."""
    folder = Path(request.config.cache.mkdir("mpi"))
    return lambda kind: wheels(kind, folder)


@pytest.fixture(scope="module")
def expected(folder):
    """The steps of the job on four ranks as launch/torchrun.sh trains them."""
    done = finished(start("torchrun.sh", 4, folder, "expected", *SPLIT))
    assert done.returncode == 0, done.stderr
    return numbers(metrics(folder / "expected"))


def command(script: str, ranks: int, folder: Path, run: str, *overrides: str) -> list[str]:
    """The command line that launches the job."""
    return [
        "bash",
        str(ROOT / "launch" / script),
        str(ranks),
        f"{folder}/job.yaml",
        f"run.dir={folder}/{run}",
        *overrides,
    ]


def launch(words: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> Any:
    """Start a launcher as a process; `finished` awaits it."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=variables, cwd=folder, stdout=pipe, stderr=pipe, text=True)


def start(script: str, ranks: int, folder: Path, run: str, *overrides: str, **environment: str) -> Any:
    """Start the job on this host."""
    return launch(command(script, ranks, folder, run, *overrides), folder, environment)


def finished(process: Any) -> subprocess.CompletedProcess[str]:
    """Wait for a launcher and return what it said; what it started is ended with it."""
    below = psutil.Process(process.pid)
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        for child in [*below.children(recursive=True), below]:
            child.kill()
        out, err = process.communicate()
        raise AssertionError(f"it hangs\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def await_first_step(process: Any, run: Path) -> None:
    """Wait until a job has made a step."""
    until = time.monotonic() + TIMEOUT_S
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
        assert process.poll() is None and time.monotonic() < until, finished(process).stderr
        time.sleep(0.1)


def stepping(script: str, run: Path, **variables: str) -> subprocess.Popen[str]:
    """Start a long job of two ranks that writes to `run`; return it when it has taken its first step."""
    process = start(script, 2, run.parent, run.name, "run.steps=3000", **variables)
    await_first_step(process, run)
    return process


def ranks_of(process: Any) -> list[psutil.Process]:
    """The ranks that a launcher has started, without the processes that they started themselves."""
    words = ["-m", "megalign", "train"]
    below = psutil.Process(process.pid).children(recursive=True)
    found = [child for child in below if words == child.cmdline()[2:5]]
    return [child for child in found if child.ppid() not in {other.pid for other in found}]


def await_end(ranks: Sequence[psutil.Process]) -> None:
    """Wait until ranks have ended whose parents are gone; the system may be slow to forget them."""
    until = time.monotonic() + TIMEOUT_S
    for rank in ranks:
        while rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until, "a rank runs on without a launcher"
            time.sleep(0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_two_hosts_give_the_numbers_of_torchrun(kind, folder, installed, expected, tmp_path):
    """Two ranks on each of two hosts, which are network namespaces; the address is that of the interface named."""
    variables = installed(kind)
    (tmp_path / "sitecustomize.py").write_text(PLACES)
    with two_hosts(tmp_path) as (addresses, host):
        hosts = {"HOSTS": ",".join(f"{address}:2" for address in addresses)}
        variables |= {**host, **hosts, "PYTHONPATH": f"{tmp_path}:{variables['PYTHONPATH']}"}
        words = command("mpirun.sh", 4, folder, kind, *SPLIT)
        done = finished(launch(inside(addresses[0], tmp_path, words), folder, variables))
    assert done.returncode == 0, done.stderr
    assert numbers(metrics(folder / kind)) == expected
    places = [(tmp_path / f"place{rank}").read_text().split() for rank in range(4)]
    assert [place[1:] for place in places] == [["0", "4"], ["1", "4"], ["0", "4"], ["1", "4"]]
    names = [place[0] for place in places]
    assert names[0] == names[1] != names[2] == names[3]


@pytest.mark.parametrize("kind", ["openmpi", pytest.param("mpich", marks=pytest.mark.slow)])
def test_a_signal_saves_and_ends_with_75(kind, folder, installed):
    run = folder / f"stopped-{kind}"
    process = stepping("mpirun.sh", run, **installed(kind))
    process.send_signal(signal.SIGTERM)
    done = finished(process)
    assert done.returncode == 75, done.stderr
    held = status(run)
    assert held["code"] == 75 and held["reason"] == "stopped by SIGTERM"
    assert checkpoint_steps(run) == [held["step"]]
    assert "BAD TERMINATION" not in done.stderr and "prterun" not in done.stderr


@pytest.mark.parametrize("kind", ["mpich", pytest.param("openmpi", marks=pytest.mark.slow)])
def test_a_rank_that_ends_before_mpi_begins_ends_the_job(kind, folder, installed, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(PLACES)
    variables = installed(kind)
    variables["PYTHONPATH"] = f"{tmp_path}:{variables['PYTHONPATH']}"
    began = time.monotonic()
    done = finished(start("mpirun.sh", 2, folder, f"early-{kind}", ENDS_EARLY="1", **variables))
    assert done.returncode not in (0, 2, 75), done.stderr
    assert "launch: the ranks ended early, by " in done.stderr
    assert time.monotonic() - began < 120  # and not watchdog.timeout_s


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_rank_ends_the_job_and_is_named(kind, folder, installed):
    run = folder / f"killed-{kind}"
    process = stepping("mpirun.sh", run, **installed(kind))
    ranks = ranks_of(process)
    assert len(ranks) == 2
    ranks[1].kill()
    done = finished(process)
    assert done.returncode not in (0, 2, 75), done.stderr
    assert " was ended by SIGKILL" in done.stderr
    await_end(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_save_where_the_launcher_is_killed(kind, folder, installed):
    run = folder / f"orphaned-{kind}"
    process = stepping("mpirun.sh", run, **installed(kind))
    ranks = ranks_of(process)
    process.kill()
    finished(process)
    await_end(ranks)
    assert status(run)["code"] == 75 and checkpoint_steps(run) == [status(run)["step"]]


def test_deepspeeds_launcher_gives_the_numbers_of_torchrun(folder, expected):
    pytest.importorskip("deepspeed")
    meet = f"--master_port {free_port()}"
    done = finished(start("deepspeed.sh", 4, folder, "deepspeed", *SPLIT, DEEPSPEED_ARGS=meet))
    assert done.returncode == 0, done.stderr
    assert numbers(metrics(folder / "deepspeed")) == expected


@pytest.mark.slow
def test_deepspeeds_launcher_on_two_machines_without_ssh(folder, expected):
    """Both machines are this one, each with its own launcher."""
    pytest.importorskip("deepspeed")
    hosts = folder / "hosts"
    hosts.write_text("# two machines\na slots=2\nb slots=2\n")
    meet = f"--no_ssh --master_addr 127.0.0.1 --master_port {free_port()}"
    both = [
        start(
            "deepspeed.sh", 2, folder, "nodes", *SPLIT, HOSTFILE=str(hosts), DEEPSPEED_ARGS=f"{meet} --node_rank {rank}"
        )
        for rank in range(2)
    ]
    for done in [finished(process) for process in both]:
        assert done.returncode == 0, done.stderr
    assert numbers(metrics(folder / "nodes")) == expected


@pytest.mark.slow
def test_a_signal_to_deepspeeds_launcher_saves_and_ends_with_75(folder):
    pytest.importorskip("deepspeed")
    run = folder / "stopped-deepspeed"
    meet = f"--master_port {free_port()}"
    process = stepping("deepspeed.sh", run, DEEPSPEED_ARGS=meet)
    process.send_signal(signal.SIGTERM)
    done = finished(process)
    assert done.returncode == 75, done.stderr
    assert status(run)["code"] == 75 and checkpoint_steps(run) == [status(run)["step"]]


def refused(script: str, folder: Path, *arguments: str, **environment: str) -> str:
    """The line by which a script refuses its arguments or what it finds, before any rank starts."""
    done = finished(launch(["bash", str(ROOT / "launch" / script), *arguments], folder, environment))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("script", ["mpirun.sh", "deepspeed.sh"])
def test_bad_use_is_one_line(script, folder):
    for arguments in ([], ["2"], ["two", "job.yaml"], ["0", "job.yaml"]):
        assert f"launch/{script} NPROC CONFIG.yaml" in refused(script, folder, *arguments)
    found = {"MPIRUN": fake(folder), **MEET}
    assert "HOSTFILE is none: must be a file" in refused(script, folder, "2", "job.yaml", HOSTFILE="none", **found)


def fake(folder: Path) -> str:
    """A program that says it is Open MPI's mpirun."""
    path = folder / "mpirun"
    path.write_text("#!/bin/bash\necho mpirun (Open MPI) 5.0.11\n")
    path.chmod(0o755)
    return str(path)


def test_what_mpirun_needs_is_said(folder):
    (folder / "without").mkdir(exist_ok=True)
    (folder / "without/mpi4py.py").write_text("raise ImportError")
    found = {"MPIRUN": fake(folder), **MEET}
    for variables, said in (
        ({"MPIRUN": "/none"}, "no mpirun at /none; must be installed, as by `pip install mpich`"),
        ({"MPIRUN": "/bin/true"}, "/bin/true is neither Open MPI's nor MPICH's"),
        ({**found, "HOSTS": "a:1,b:2"}, "NPROC is 4: must be at most 3"),
        ({**found, "HOSTS": "a:0"}, "'a:0' in HOSTS: must be a machine's name, or name:ranks"),
        ({**found, "HOSTS": "a", "HOSTFILE": "b"}, "HOSTS and HOSTFILE are both set"),
        ({"MPIRUN": fake(folder), "PYTHONPATH": str(folder / "without")}, "must be installed: pip install mpi4py"),
    ):
        assert said in refused("mpirun.sh", folder, "4", "job.yaml", **variables)


@pytest.mark.parametrize("script", ["mpirun.sh", "deepspeed.sh"])
def test_bad_input_ends_before_ranks_start(script, folder):
    found = {"MPIRUN": fake(folder), **MEET}
    line = refused(script, folder, "4", "job.yaml", "run.sed=1", **found)
    assert line.startswith("megalign: error: command line: run.sed is not a known key")
