"""Start-up of a job's processes, and what becomes of their failures."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalign.__main__ import main
from megalign.runtime.distributed import MeetingError, _await_ranks, free_port, launched, process_group, spawn
from megalign.runtime.status import write_status
from megalign.schema import UserError
from tests.support.processes import run_ranks


def gather_ranks(folder: str) -> None:
    with process_group(timeout_s=60) as world:
        total = torch.tensor([10**world.rank])
        dist.all_reduce(total)
        answer = f"{world.rank} of {world.size}, main {world.is_main}, sum {total.item()}, {torch.get_num_threads()}"
        (Path(folder) / str(world.rank)).write_text(answer)


def fail_on_second() -> None:
    with process_group(timeout_s=60) as world:
        if world.rank == 1:
            raise ValueError("rank 1 has had enough")
        time.sleep(300)  # still busy when the other one fails


def test_spawned_processes_form_one_job(tmp_path):
    spawn(gather_ranks, 2, str(tmp_path))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "0": "0 of 2, main True, sum 11, 1",
        "1": "1 of 2, main False, sum 11, 1",
    }


def test_a_failing_process_ends_the_job_with_its_reason():
    start = time.monotonic()
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="rank 1 has had enough"):
        spawn(fail_on_second, 2)
    assert time.monotonic() - start < 200, "the busy rank was waited for"


def test_alone_needs_no_launcher_and_leaves_nothing_behind(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    for _ in range(2):
        with process_group(timeout_s=60) as world:
            assert (world.rank, world.size, world.is_main) == (0, 1, True)
            assert dist.is_initialized()
        assert not dist.is_initialized()
    assert dict(os.environ) == before


def test_group_is_left_after_a_failure_too():
    with pytest.raises(ZeroDivisionError), process_group(timeout_s=60):
        1 / 0  # noqa: B018
    assert not dist.is_initialized()


def test_place_in_the_job_comes_from_the_launcher(monkeypatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert launched() == (5, 8, 1)


def meet_as_job(folder: str, ports: list[int]) -> None:
    """Ranks 0 and 1 are those of job A, 2 and 3 those of job B, whose rank 0 finds the port taken."""
    number = int(os.environ["RANK"])
    os.environ.update(
        RANK=str(number % 2), WORLD_SIZE="2", MASTER_PORT=str(ports[0]), MEGALIGN_ATTEMPT="AB"[number // 2]
    )
    if number // 2 == 1:  # after job A, whose ranks stay until both of job B have given up
        while not Path(folder, "A 0").exists():
            time.sleep(0.1)
    told = ""
    try:
        with process_group(timeout_s=60 if number < 2 else 3) as world:
            total = torch.tensor([10**world.rank])
            dist.all_reduce(total)
            told = f"sum {total.item()}"
            Path(folder, f"A {world.rank}").write_text(told)
            while not all(Path(folder, f"B {rank}").exists() for rank in (0, 1)):
                time.sleep(0.1)
    except (UserError, MeetingError) as error:
        told = str(error)
    Path(folder, f"{'AB'[number // 2]} {number % 2}").write_text(told)


def test_jobs_that_share_a_port_do_not_meet(tmp_path):
    """As two jobs of Slurm on one machine may; with one name for both, rank 1 of job B would take A's for its own."""
    run_ranks(meet_as_job, 4, str(tmp_path), [free_port()])
    told = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert told["A 0"] == told["A 1"] == "sum 11"
    assert told["B 0"].startswith("MASTER_PORT is ") and "another process uses it" in told["B 0"]
    assert "1 of 2 ranks came, missing: 0;" in told["B 1"]


PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
WRONG = [
    ({"WORLD_SIZE": "2"}, "RANK is missing: WORLD_SIZE is 2"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is missing: WORLD_SIZE is 2"),
    ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": ""}, "MASTER_ADDR is missing"),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is missing: WORLD_SIZE is 2"),
    ({**PLACE, "WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2: must be below WORLD_SIZE 2"),
    ({**PLACE, "WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE is 'two': must be a whole number"),
    ({**PLACE, "WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1': must be a whole number"),
    ({**PLACE, "WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE is '0'"),
    ({**PLACE, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
    ({**PLACE, "WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    ({**PLACE, "WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "70000"}, "MASTER_PORT is 70000: must be 1 to 65535"),
    ({**PLACE, "WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "no such host"}, "MASTER_ADDR is 'no such host'"),
    ({"RANK": "1"}, "WORLD_SIZE is missing: RANK is 1"),
]


def set_launcher(monkeypatch, settings) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


def test_a_wrong_launcher_is_told_in_the_status(monkeypatch, tmp_path, capsys):
    """Also of the variables that are read first, and in the place of an earlier refusal."""
    config = tmp_path / "job.yaml"
    config.write_text(f"run: {{dir: {tmp_path}/run}}\n")
    write_status(tmp_path / "run", 1, "rank 1 did not come", None)
    set_launcher(monkeypatch, {"RANK": "x", "WORLD_SIZE": "2"})
    assert main(["train", str(config)]) == 2
    assert "RANK is 'x'" in json.loads((tmp_path / "run" / "status.json").read_text())["reason"]
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("settings", "expected"), WRONG, ids=[wrong[1] for wrong in WRONG])
def test_launcher_that_sets_too_little_or_wrong(settings, expected, monkeypatch):
    set_launcher(monkeypatch, settings)
    with pytest.raises(UserError) as raised, process_group(timeout_s=60):
        pass
    assert expected in str(raised.value) and "\n" not in str(raised.value)
    assert not dist.is_initialized()


def test_one_process_needs_no_meeting_point(monkeypatch):
    set_launcher(monkeypatch, {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "nowhere.invalid"})
    with process_group(timeout_s=60) as world:
        assert world.size == 1


def test_busy_port(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        set_launcher(monkeypatch, {**PLACE, "WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": port})
        with (
            pytest.raises(UserError, match=f"MASTER_PORT is {port}: another"),
            process_group(timeout_s=9),
        ):
            pass
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(MeetingError, match="does not answer as a rank of a job"), process_group(timeout_s=0.5):
            pass


@pytest.mark.parametrize(
    ("rank", "expected"), [("0", "1 of 3 ranks came, missing: 1, 2; all must be"), ("1", "rank 0 does not answer")]
)
def test_peers_that_never_come_are_named(rank, expected, monkeypatch):
    port = str(free_port())
    set_launcher(monkeypatch, {**PLACE, "WORLD_SIZE": "3", "RANK": rank, "MASTER_PORT": port})
    with pytest.raises(MeetingError) as raised, process_group(timeout_s=0.5):
        pass
    message = str(raised.value)
    assert message.startswith(f"rank {rank} of 3: waited up to 0.5 s (watchdog.timeout_s) at MASTER_ADDR 127.0.0.1")
    assert f"MASTER_PORT {port}" in message and expected in message and "\n" not in message


def meet(store: dist.Store, places: list[tuple[int, int]]) -> list[str]:
    """What each (rank, world size) heard, those that came first."""
    heard = [""] * len(places)

    def come(number: int) -> None:
        try:
            _await_ranks(store, *places[number], time.monotonic() + 30)
        except (UserError, RuntimeError) as error:
            heard[number] = str(error)

    threads = [threading.Thread(target=come, args=(number,)) for number in range(len(places))]
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # one after another
    for thread in threads:
        thread.join(60)
    return heard


def test_ranks_that_contradict_each_other_end_the_meeting():
    assert meet(dist.HashStore(), [(0, 2), (1, 2)]) == ["", ""]
    twice = "RANK is 1: another process of the job has it too; must be different for each"
    assert meet(dist.HashStore(), [(0, 3), (1, 3), (1, 3)]) == [twice] * 3
    other = "WORLD_SIZE is 3: another rank has 2; must be the same for all"
    assert meet(dist.HashStore(), [(0, 2), (1, 3)]) == [other] * 2
