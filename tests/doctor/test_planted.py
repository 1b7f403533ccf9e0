"""Real faults of ranks, machines and networks, each of which the doctor finds and names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from megalign.runtime.distributed import free_port
from tests.support.doctor_visits import ROOT, Rank, doctor, on
from tests.support.hosts import namespaces
from tests.support.processes import run_python
from tests.support.tiny_jobs import records, write_config, write_lines, write_model

COMPILER = shutil.which("cc")
# A machine's wall clock that is 90 s ahead, and nothing else: libfaketime also changes sleeping, which then may fail.
AHEAD = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += 90;
    return code;
}
"""


def another_environment(folder: Path) -> Rank:
    """A rank with other versions of three packages, another source, an early clock and low limits."""
    for name, version in {"transformers": "5.0.1", "pydantic": "1.10", "numpy": "1.26.1"}.items():
        about = folder / "packages" / f"{name}-{version}.dist-info" / "METADATA"
        about.parent.mkdir(parents=True)
        about.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    shutil.copytree(ROOT / "megalign", folder / "source" / "megalign", ignore=shutil.ignore_patterns("__pycache__"))
    with open(folder / "source" / "megalign" / "losses" / "gvpo.py", "a") as file:
        file.write("# changed\n")
    environment = {"PYTHONPATH": str(folder / "packages")}
    if COMPILER is not None:
        (folder / "ahead.c").write_text(AHEAD)
        command = [COMPILER, "-shared", "-fPIC", "-o", str(folder / "ahead.so"), str(folder / "ahead.c"), "-ldl"]
        subprocess.run(command, check=True, timeout=60)
        environment["LD_PRELOAD"] = str(folder / "ahead.so")
    limits = ("sh", "-c", 'ulimit -n 200 && ulimit -f 4000000 && exec "$@"', "sh")
    return Rank(limits, environment, source=folder / "source")


@pytest.fixture(scope="module")
def visited(tmp_path_factory):
    """A visit of two ranks of which the second has everything wrong."""
    return doctor(ranks=[Rank(), another_environment(tmp_path_factory.mktemp("other"))])


def test_other_versions_fail(visited):
    assert visited.codes == [2, 2] and not visited.report["ok"]
    found = visited.found("versions")
    (text,) = [text for state, text in found if state == "fail" and text.startswith("transformers differs: ")]
    assert "5.0.1 (rank 1 on " in text
    assert [state for state, text in found if text.startswith("numpy differs")] == ["warn"]


def test_another_source_fails(visited):
    assert [state for state, text in visited.found("versions") if text.startswith("source of megalign differs")] == [
        "fail"
    ]


def test_unmet_requirement_fails(visited):
    (text,) = [text for state, text in visited.found("requirements") if state == "fail"]
    assert "pydantic<3,>=2.7: 1.10 is installed (rank 1 on " in text


def test_low_limits_fail(visited):
    texts = [text for state, text in visited.found("limits") if state == "fail"]
    assert any(text.startswith("open files (ulimit -n): 200, of which this job may need 272; rank 1") for text in texts)
    assert any(text.startswith("size of a file (ulimit -f): ") for text in texts)


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_early_clock_fails(visited):
    ((state, text),) = visited.found("clocks")
    assert (
        state == "fail" and "rank 1 on " in text and float(text.split(": ")[-1].removesuffix(" s")) in (89.9, 90, 90.1)
    )


def busy() -> bool:
    """Whether so many others use the machine that nothing can be said of times."""
    return os.getloadavg()[0] > 2 * len(os.sched_getaffinity(0))


def job(folder: Path) -> Path:
    """The configuration of a small job whose inputs are all there."""
    write_model(folder / "model")
    write_lines(folder / "data.jsonl", records("samples"))
    return write_config(folder)


def test_healthy_ranks_of_a_job(tmp_path):
    visit = doctor(str(job(tmp_path)), "parallel.tensor=2", ranks=[Rank()] * 4)
    assert visit.codes == [0] * 4, visit.output
    assert visit.report["ok"] and visit.report["job"]["ranks"] == 4
    assert visit.report["job"]["seconds"] < 60 or busy()
    measured = [each["check"] for each in visit.report["findings"] if each["check"].startswith("network")]
    assert set(measured) == {"network tensor", "network data"}
    ((state, text),) = visit.found("engine")
    assert state == "ok" and text.startswith("megatron: tensor 2 x pipeline 1 x data 2; torch layers on cpu")


def test_wrong_configuration_of_one_rank_fails(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        job(folder)
    (there / "job.yaml").write_text("run: {dir: x}\nmodle: {}\n")
    visit = doctor("job.yaml", ranks=[Rank(folder=here), Rank(folder=there)])
    assert visit.codes == [2, 2]
    ((state, text),) = visit.found("configuration")
    assert state == "fail" and "modle is not a known key" in text and "rank 1 on " in text


def test_ranks_that_are_stuck_end_and_rank_0_reports(tmp_path):
    os.mkfifo(tmp_path / "job.yaml")  # as a file on a server that is gone: reading it never ends
    code = "import sys; from megalign.doctor import command; command.LIMIT_S = 3.0; "
    code += "sys.exit(command.main(['job.yaml', '--json']))"
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **meeting, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        (out, _), (_, errors) = (rank.communicate(timeout=120) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [2, 2]
    (finding,) = json.loads(out)["findings"]
    wanted = "was stuck in reading job.yaml: the doctor ends after 3 s"
    assert finding["check"] == "answers" and finding["found"] == f"rank 0 {wanted}"
    assert f": rank 1 {wanted}" in errors


@pytest.fixture(scope="module")
def pair():
    lacking = [name for name in ("ip", "nft", "tc", "unshare", "hostname") if shutil.which(name) is None]
    if lacking:
        pytest.skip(f"not installed: {', '.join(lacking)}")
    with namespaces() as hosts:
        yield hosts


@contextmanager
def fault(hosts, number, start, end):
    """Run a command on one machine before the block, and another one after it."""

    def run(command: str) -> None:
        subprocess.run([*hosts.prefixes[number], *command.split()], check=True, capture_output=True, timeout=30)

    run(start)
    try:
        yield
    finally:
        run(end)


@contextmanager
def dropping(hosts, number, packets):
    """Have one machine drop packets that come from the other one."""
    nft = [*hosts.prefixes[number], "nft"]
    chain = "{ type filter hook input priority 0; }"
    script = f"add table inet closed; add chain inet closed in {chain}; add rule inet closed in iif eth0 {packets} drop"
    subprocess.run([*nft, script], check=True, capture_output=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run([*nft, "delete table inet closed"], capture_output=True, timeout=30)


def test_closed_ports_fail(pair):
    # Answers of rank 0's machine pass, so that ranks meet there; nobody can connect to the other one.
    with dropping(pair, 1, "tcp flags syn / syn,ack"):
        visit = doctor(ranks=[on(pair, 0), on(pair, 1)], address=pair.address)
    assert visit.codes == [2, 2]
    ((state, text),) = visit.found("reachability")
    assert state == "fail" and text.startswith("rank 0 on left cannot reach rank 1 on right at 10.99.0.2:")
    assert text.endswith("timed out")


def test_lost_packets_and_a_name_that_is_the_loopback_fail(pair):
    with ExitStack() as faults:
        for number in (0, 1):  # jumbo frames, which a switch between the machines does not carry
            faults.enter_context(fault(pair, number, "ip link set eth0 mtu 9000", "ip link set eth0 mtu 1500"))
        faults.enter_context(dropping(pair, 1, "meta length > 2000"))
        visit = doctor(ranks=[on(pair, 0), on(pair, 1, interface="")], address=pair.address)
    assert visit.codes == [2, 2]
    (first, name), (second, lost) = visit.found("reachability")
    assert first == second == "fail"
    assert name.startswith("rank 0 on left cannot reach rank 1 on right at 127.0.0.1:") and "loopback" in name
    assert lost.startswith("rank 1 on right cannot reach rank 0 on left at 10.99.0.1:")
    assert lost.endswith(": of 65536 bytes 0 arrived: large packets may be lost on the way (MTU)")


def test_interface_that_is_not_there_fails_on_all_ranks(pair):
    visit = doctor(ranks=[on(pair, 0), on(pair, 1, interface="eth7")], address=pair.address)
    assert visit.codes == [2, 2] and (visit.report["job"]["seconds"] < 25 or busy())  # nobody waits for the other
    ((state, text),) = visit.found("reachability")
    wanted = "could not be checked on rank 1 on right: network interface 'eth7' is not there; must be one of"
    assert state == "fail" and text.startswith(wanted)


def test_slow_link_fails(pair):
    limit = "tc qdisc add dev eth0 root tbf rate 8mbit burst 32kbit latency 800ms"
    with (
        fault(pair, 0, limit, "tc qdisc del dev eth0 root"),
        fault(pair, 1, "ip link set eth0 mtu 1400", "ip link set eth0 mtu 1500"),
    ):
        visit = doctor(ranks=[on(pair, 0), on(pair, 1)], address=pair.address)
    assert visit.codes == [2, 2], visit.output
    texts = [text for state, text in visit.found("network all") if state == "fail"]
    assert any(text.startswith("between machines: all-reduce 0.00") and "all 2 ranks" in text for text in texts), texts
    assert visit.report["job"]["hosts"] == 2 and (visit.report["job"]["seconds"] < 60 or busy())
    assert visit.found("interfaces") == [
        ("warn", "largest packets (MTU) differ: 1500 (rank 0 on left); 1400 (rank 1 on right)")
    ]


def test_command_line_of_its_own(tmp_path):
    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return run_python(tmp_path, "-m", "megalign", "doctor", *words, environment=environment, timeout_s=120)

    plain = run()
    assert plain.returncode == 0 and plain.stdout.splitlines()[-1].startswith("doctor: ")
    refused = run("--jason")
    assert refused.returncode == 2 and "did you mean --json?" in refused.stderr.splitlines()[-1]
    missing = run("none.yaml")
    assert missing.returncode == 2 and "fail  configuration" in missing.stdout and "none.yaml" in missing.stdout

    command = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "megalign",
        "doctor",
        "none.yaml",
        "--json",
    ]
    ranks = run_python(tmp_path, *command, environment={"PYTHONPATH": str(ROOT)}, timeout_s=120)
    report = json.loads(ranks.stdout)  # whole, although torchrun ends all ranks once one has ended
    assert ranks.returncode == 1 and not report["ok"] and report["job"]["ranks"] == 2

    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    first = run("--wait", "3", RANK="0", **meeting)
    assert first.returncode == 2 and "1 of 2 ranks came, missing: 1" in first.stdout
    second = run("--wait", "2", RANK="1", **meeting)
    assert second.returncode == 2 and "rank 0 does not answer (Connection refused)" in second.stderr
    unknown = run("--wait", "2", RANK="1", **meeting | {"MASTER_ADDR": "nowhere.invalid"})
    assert unknown.returncode == 2 and "MASTER_ADDR is 'nowhere.invalid': not resolved" in unknown.stderr
