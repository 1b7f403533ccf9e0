"""A real Slurm on this machine, of virtual nodes: controller, a daemon for each node, and munge with a key of its own.

Run: python tests/support/slurm_cluster.py FOLDER     serves a cluster until its standard input is closed
Everything it starts, job steps too, is a descendant of that process, which ends all of them when its input closes, as
it does when the test's process dies.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
NODES = ("n1", "n2", "n3")
READY_S, STOP_S = 30.0, 20.0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)
SBIN = "/usr/sbin:/sbin"

# Virtual nodes cannot confine their jobs (linuxproc, task/none), and have more processors than the machine
# (config_overrides). A requeued job waits until its credential has expired, 120 s by default. Slurm looks at time
# limits and signals every 30 s.
SLURM_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
GresTypes=gpu
MailProg=/bin/true
JobRequeue=1
ReturnToService=1
KillWait=10
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs=8 RealMemory=4000 Gres=gpu:2
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
"""


def missing_programs() -> str:
    """Return why a cluster cannot run here, or ""."""
    path = f"{os.environ['PATH']}:{SBIN}"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"needs Slurm and munge (apt-get install slurmctld slurmd slurm-client munge); missing: {missing}"
    return "" if os.geteuid() == 0 else "needs root: slurmd starts jobs in their users' names"


@dataclass
class Cluster:
    """Runs Slurm's commands on the cluster served from `folder`."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Return this process's environment, with the cluster's configuration and without any job's variables."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**plain, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str | Path, cwd: Path | None = None, **variables: str) -> str:
        """Run a command and return its standard output; AssertionError if it fails."""
        done = subprocess.run(
            [str(word) for word in command],
            env={**self.environment, **variables},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *arguments: str | Path, cwd: Path | None = None, **variables: str) -> str:
        """Submit a job and return its number."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, **variables).split(";")[0].strip()

    def job(self, number: str) -> dict[str, str]:
        """Return the fields that `scontrol show job` shows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", number)))

    def await_job(self, number: str, reached: Callable[[dict[str, str]], bool], timeout_s: float) -> dict[str, str]:
        """Wait until a job's fields say so, and return them."""
        until = time.monotonic() + timeout_s
        while not reached(fields := self.job(number)):
            assert time.monotonic() < until, f"job {number} is not there after {timeout_s:g} s: {fields}"
            time.sleep(0.3)
        return fields

    def end(self, number: str, timeout_s: float = 120.0) -> dict[str, str]:
        """Wait for the end of a job and return its fields."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        return self.await_job(number, lambda fields: fields["JobState"] in over, timeout_s)


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Serve a cluster from an empty folder inside the block."""
    log = folder / "cluster.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, __file__, str(folder)], stdin=subprocess.PIPE, stdout=output, stderr=output
        )
    try:
        cluster, until = Cluster(folder), time.monotonic() + READY_S
        while not _all_idle(cluster):
            assert server.poll() is None and time.monotonic() < until, f"no Slurm:\n{log.read_text()[-4000:]}"
            time.sleep(0.2)
        yield cluster
    finally:
        assert server.stdin is not None
        server.stdin.close()
        try:
            server.wait(STOP_S + 10.0)
        finally:
            server.kill()


def _all_idle(cluster: Cluster) -> bool:
    if not (cluster.folder / "slurm.conf").exists():
        return False
    done = subprocess.run(
        ["sinfo", "-h", "-o", "%t %D"], env=cluster.environment, capture_output=True, text=True, timeout=30
    )
    return done.stdout.split() == ["idle", str(len(NODES))]


def serve(folder: Path) -> None:
    """Start the daemons and end them, with all that they have started, once standard input is closed."""
    from megalign.runtime.distributed import free_port

    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # a step's daemon leaves its parent; it comes to this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the test, which then closes the input
    os.environ["PATH"] += f":{SBIN}"
    key = folder / "key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o400)
    (folder / "state").mkdir()
    host, nodes = socket.gethostname().split(".")[0], ""
    for name in NODES:
        (folder / f"spool-{name}").mkdir()
        nodes += f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()}\n"
    text = SLURM_CONF.format(
        host=host,
        port=free_port(),
        user=psutil.Process().username(),
        folder=folder,
        nodes=nodes,
    )
    munge = ["key-file=key", "socket=munge.socket", "pid-file=munge.pid", "seed-file=seed", "log-file=munge.log"]
    start = [["munged", "--foreground", "--force", *(f"--{word.replace('=', f'={folder}/')}" for word in munge)]]
    conf = folder / "slurm.conf"
    for number in range(2):
        (folder / f"gpu{number}").touch()  # stands for a device; nothing opens it
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    start.append(["slurmctld", "-D", "-f", str(conf)])
    start += [["slurmd", "-D", "-N", name, "-f", str(conf)] for name in NODES]

    def die_with_server() -> None:
        libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)

    try:
        conf.write_text(text)
        daemons = [subprocess.Popen(command, preexec_fn=die_with_server, stdin=subprocess.DEVNULL) for command in start]
        while not select.select([sys.stdin], [], [], 0.5)[0]:
            if any(daemon.poll() is not None for daemon in daemons):
                return
    finally:
        _end_all()


def _end_all() -> None:
    """Kill and reap every descendant of this process, until none is left."""
    until = time.monotonic() + STOP_S
    while (left := psutil.Process().children(recursive=True)) and time.monotonic() < until:
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=1.0)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    serve(Path(sys.argv[1]))
