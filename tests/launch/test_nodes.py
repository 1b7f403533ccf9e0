"""Jobs on several machines: the same bits as on one, one restart and one ending for all, and no wait without an end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megalign.runtime.distributed import free_port
from megalign.runtime.nodes import nodes_of
from megalign.schema import UserError
from tests.support.hosts import LOOPBACK, Hosts, namespaces, started, until
from tests.support.processes import on_two_ranks
from tests.support.tiny_jobs import ROOT, metrics, numbers, records, status, write_config, write_lines, write_model

LAUNCH = ["bash", ROOT / "launch/torchrun.sh"]
SMALL = [sys.executable, "-m", "megalign.runtime.torchrun"]
RANK = ["-m", "tests.support.small_rank"]


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """Two machines: on the loopback, or network namespaces."""
    if request.param == "loopback":
        yield LOOPBACK
    else:
        with namespaces() as made:
            yield made


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration, and its run on two ranks of one machine in `one`."""
    folder = tmp_path_factory.mktemp("nodes")
    write_model(folder / "model")
    write_lines(folder / "data.jsonl", records("samples"))
    config = write_config(folder, run={"steps": 10}, checkpoint={"every": 1})
    on_two_ranks(folder, [(["train", str(config), f"run.dir={folder}/one", f"export.hf_dir={folder}/one/hf"], 0)])
    return folder


def same_bits(job: Path, run: Path) -> None:
    """Assert that a run gave the metrics and the weights of the one on one machine, to the bit."""
    assert numbers(metrics(run)) == numbers(metrics(job / "one"))
    name = "model.safetensors"
    assert (run / "hf" / name).read_bytes() == (job / "one" / "hf" / name).read_bytes()


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


SLOW = pytest.param("namespaces", marks=pytest.mark.slow)


@pytest.mark.parametrize("hosts", ["loopback", SLOW], indirect=True)
def test_a_stop_and_a_death_on_the_other_machine_change_no_bit(hosts, job, tmp_path):
    run = tmp_path / "run"
    command = [*LAUNCH, "1", job / "job.yaml", f"run.dir={run}", f"export.hf_dir={run}/hf"]
    with started(tmp_path / "first", command, hosts, MAX_RESTARTS="3") as running:
        until(lambda: steps(run) >= 2, running)
        running.processes[1].terminate()
        assert running.codes() == [75, 75], (running.printed(0), running.printed(1))
        assert not any("restart" in running.printed(number) for number in (0, 1))
    stopped = status(run)
    assert stopped["code"] == 75 and 2 <= stopped["step"] < 10
    with started(tmp_path / "second", command, hosts, MAX_RESTARTS="1") as running:
        until(lambda: steps(run) > stopped["step"], running)
        running.rank(1).kill()
        assert running.codes() == [0, 0], (running.printed(0), running.printed(1))
        for number in (0, 1):
            assert "launch: rank 1 was ended by SIGKILL; restart 1 of 1" in running.lines(number)
    same_bits(job, run)


@pytest.mark.parametrize("hosts", [pytest.param("loopback", marks=pytest.mark.slow), "namespaces"], indirect=True)
def test_two_machines_give_the_bits_of_one(hosts, job, tmp_path):
    run = tmp_path / "run"
    command = [*LAUNCH, "1", job / "job.yaml", f"run.dir={run}", f"export.hf_dir={run}/hf"]
    with started(tmp_path / "out", command, hosts) as running:
        assert running.codes() == [0, 0], (running.printed(0), running.printed(1))
        assert running.lines(0) == running.lines(1) == []
    same_bits(job, run)


@pytest.mark.slow
def test_two_ranks_on_each_of_two_machines(job, tmp_path):
    """Rank 2, the first of the other machine, dies; four ranks on one machine are the reference."""
    parts = [job / "job.yaml", "parallel.tensor=2"]
    for folder, count, hosts, death in (("whole", "4", Hosts([[]]), False), ("parts", "2", LOOPBACK, True)):
        run = tmp_path / folder
        command = [*LAUNCH, count, *parts, f"run.dir={run}", f"export.hf_dir={run}/hf"]
        with started(tmp_path / f"{folder}_out", command, hosts, MAX_RESTARTS="1") as running:
            until(lambda run=run: steps(run) >= 3, running)
            if death:
                running.rank(2).kill()
            assert set(running.codes()) == {0}, running.printed(0)
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    assert numbers(metrics(parts)) == numbers(metrics(whole))
    assert (parts / "hf/model.safetensors").read_bytes() == (whole / "hf/model.safetensors").read_bytes()


def test_bad_input_ends_all_machines_at_once(job, tmp_path):
    command = [*LAUNCH, "1", job / "job.yaml", f"run.dir={tmp_path}/run", "run.sed=1"]
    with started(tmp_path / "out", command, MAX_RESTARTS="3") as running:
        assert running.codes() == [2, 2]
        for number in (0, 1):
            assert len(running.lines(number)) == 1, running.printed(number)
            assert running.lines(number)[0].startswith("megalign: error: command line: run.sed is not a known key")


@pytest.mark.parametrize("refusing", [0, 1])
def test_a_machine_whose_checks_refuse_the_job_ends_it_on_the_other(refusing, tmp_path):
    script = (
        f'[ "$NODE_RANK" = {refusing} ] && refused="--refused 2"; exec {" ".join(SMALL)} $refused 1 {" ".join(RANK)}'
    )
    with started(tmp_path / "out", ["bash", "-c", script]) as running:
        assert running.codes() == [2, 2]
        assert running.lines(refusing) == []
        line = f"launch: node {refusing} ended the job with code 2: its checks refused the job"
        assert running.lines(1 - refusing) == [line]


@pytest.mark.parametrize("victim", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_codes_after_which_nothing_is_restarted(victim, tmp_path):
    ending = {"VICTIM": victim, "EXIT_CODE": "2", "DEATHS": "9", "MAX_RESTARTS": "3"}
    with started(tmp_path / "out", [*SMALL, "1", *RANK], **ending) as running:
        assert running.codes() == [2, 2]
        assert (
            f"launch: node {victim} ended the job with code 2: rank {victim} ended with exit code 2"
            in running.lines(1 - int(victim))
        )
        assert not any("restart" in running.printed(number) for number in (0, 1))


def test_a_machine_that_does_not_come_is_not_waited_for_for_ever(tmp_path):
    alone = Hosts([[]])
    for rank, line in (
        ("0", "1 of 2 nodes came, missing: 1; all must be started with the same command"),
        ("1", "the node that serves the store does not answer (Connection refused); must be started there and be "),
    ):
        command = [*SMALL, "1", *RANK]
        with started(tmp_path / rank, command, alone, NNODES="2", NODE_RANK=rank, RDZV_TIMEOUT="2") as running:
            assert running.codes() == [1]
            assert len(running.lines(0)) == 1 and line in running.lines(0)[0], running.printed(0)
            assert "2 s (RDZV_TIMEOUT) at MASTER_ADDR 127.0.0.1, MASTER_PORT " in running.lines(0)[0]


def test_machines_that_are_started_differently_are_refused(tmp_path):
    script = f'exec {" ".join(SMALL)} "$COUNT" {" ".join(RANK)}'
    with started(tmp_path / "count", ["bash", "-c", script], COUNT={0: "1", 1: "2"}) as running:
        assert running.codes() == [2, 2]
        assert any("the number of ranks a node is" in line for line in running.lines(0) + running.lines(1))
    twice = {"RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "NODE_RANK": "1"}
    with started(tmp_path / "twice", [*SMALL, "1", *RANK], **twice) as running:
        assert running.codes() == [2, 2]
        for number in (0, 1):
            assert "megalign: error: NODE_RANK is 1 on two nodes: must be different on each" in running.lines(number)


@pytest.mark.slow
def test_ten_restarts_in_a_row(tmp_path):
    deaths = {"VICTIM": "1", "KILL_SIGNAL": "9", "DEATHS": "10", "MAX_RESTARTS": "10"}
    with started(tmp_path / "out", [*SMALL, "1", *RANK], **deaths) as running:
        assert running.codes() == [0, 0], running.printed(0)
        expected = [f"launch: rank 1 was ended by SIGKILL; restart {number} of 10" for number in range(1, 11)]
        assert running.lines(0) == running.lines(1) == expected
        assert "attempt 10, rank 0 of 2, sum 4" in running.printed(0)


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 1])
def test_ranks_save_when_an_agent_is_killed(host, job, tmp_path):
    """The other machine's ranks stop at the same step; with the agent on machine 0 goes the store, too."""
    run = tmp_path / "run"
    command = [*LAUNCH, "1", job / "job.yaml", f"run.dir={run}", "run.steps=2000", "checkpoint.every=0"]
    with started(tmp_path / "out", command) as running:
        until(lambda: steps(run) >= 2, running)
        ranks = [running.rank(number) for number in (0, 1)]
        running.agent(host).send_signal(signal.SIGKILL)
        assert running.codes() == [75, 75], (running.printed(0), running.printed(1))
        assert not psutil.wait_procs(ranks, timeout=1)[1]
    assert status(run)["code"] == 75


@pytest.mark.slow
def test_another_machine_takes_the_place_of_one_whose_launcher_died(tmp_path):
    """It takes a minute until the dead one is given up."""
    command = [*SMALL, "1", *RANK]
    job = {"NNODES": "2", "MASTER_PORT": str(free_port()), "MAX_RESTARTS": "1"}
    with started(tmp_path / "first", command, SECONDS="3", **job) as running:
        until(lambda: all("sleeping" in running.printed(number) for number in (0, 1)), running)
        running.processes[1].kill()
        with started(tmp_path / "second", command, Hosts([[]]), NODE_RANK={0: "1"}, **job) as second:
            assert second.codes() == [0] and running.codes() == [0, -9]
            assert second.lines(0) == running.lines(0)
            assert running.lines(0) == ["launch: rank 0 ended with exit code 1; restart 1 of 1"]
            assert "attempt 1, rank 1 of 2, sum 4" in second.printed(0)


def test_what_the_environment_says():
    alone = nodes_of({"MASTER_ADDR": "of another launcher", "NNODES": " ", "MAX_RESTARTS": "2"})
    assert (alone.count, alone.rank, alone.address, alone.serves, alone.max_restarts) == (1, 0, "127.0.0.1", True, 2)
    two = nodes_of({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"})
    assert (two.count, two.rank, two.address, two.port, two.serves) == (2, 1, "node0", 29500, False)
    assert (two.timeout_s, two.max_restarts, two.job) == (600, 0, "megalign")
    by_endpoint = nodes_of({"NNODES": "2", "RDZV_ENDPOINT": "[::1]:77", "RDZV_ID": "a.b", "MASTER_ADDR": "ignored"})
    assert (by_endpoint.address, by_endpoint.port, by_endpoint.serves, by_endpoint.rank) == ("::1", 77, None, None)
    assert nodes_of({"NNODES": "2", "RDZV_ENDPOINT": "node0"}).port == 29400


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ("NNODES=two", "NNODES is 'two': must be a whole number >= 1"),
        ("NNODES=0", "NNODES is '0': must be a whole number >= 1"),
        ("NNODES=1:4", "NNODES is '1:4': must be a whole number >= 1; a job keeps its number of nodes"),
        ("NODE_RANK=1", "NODE_RANK is 1: must be below NNODES, 1"),
        ("NNODES=2", "MASTER_ADDR is missing: NNODES is 2; must be"),
        ("NNODES=2 MASTER_ADDR=a", "NODE_RANK is missing: NNODES is 2; must be this node's number, 0 to 1"),
        ("NNODES=2 MASTER_ADDR=a NODE_RANK=2", "NODE_RANK is 2: must be below NNODES, 2"),
        ("NNODES=2 MASTER_ADDR=a NODE_RANK=-1", "NODE_RANK is '-1': must be a whole number >= 0"),
        ("NNODES=2 MASTER_ADDR=a NODE_RANK=0 MASTER_PORT=70000", "MASTER_PORT is 70000: must be 1 to 65535"),
        ("NNODES=2 RDZV_ENDPOINT=a:b", "RDZV_ENDPOINT is 'a:b': must be host:port"),
        ("RDZV_TIMEOUT=0", "RDZV_TIMEOUT is '0': must be a whole number >= 1"),
        ("MAX_RESTARTS=-1", "MAX_RESTARTS is '-1': must be a whole number >= 0"),
        ("RDZV_ID=a/b", "RDZV_ID is 'a/b': must be of letters"),
    ],
)
def test_values_that_are_refused(variables, line):
    with pytest.raises(UserError) as raised:
        nodes_of(dict(word.split("=") for word in variables.split()))
    assert str(raised.value).startswith(line)
