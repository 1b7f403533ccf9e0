"""How a job ends where only files and exit codes are seen."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

from megalign.runtime.distributed import free_port, process_group
from megalign.runtime.exit_codes import BAD_INPUT, STOPPED
from megalign.runtime.job import work_on_rank
from megalign.runtime.status import (
    RESULT_FILE,
    Ending,
    PhaseError,
    during,
    explain,
    guarded,
    is_consequence,
    write_status,
)
from megalign.runtime.stop import StoppedEarly
from megalign.schema import UserError


def refuse() -> int:
    raise UserError("data.path:\n  no such file")


def test_status_is_replaced_whole(tmp_path):
    folder = tmp_path / "new" / "run"
    write_status(folder, 0, "done", 7)
    write_status(folder, STOPPED, "SIGTERM", 9)
    assert json.loads((folder / "status.json").read_text()) == {"code": 75, "reason": "SIGTERM", "step": 9}
    assert [path.name for path in folder.iterdir()] == ["status.json"]


def test_bad_input_is_one_line_a_code_and_a_status(tmp_path, capsys):
    assert guarded(refuse, lambda: str(tmp_path)) == BAD_INPUT == 2
    assert capsys.readouterr() == ("", "megalign: error: data.path: no such file\n")
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "code": 2,
        "reason": "data.path: no such file",
        "step": None,
    }


@pytest.mark.parametrize(("step", "code", "doing"), [(None, 2, ""), (0, 2, ""), (7, 1, "step 8: ")])
def test_what_explains_itself_is_bad_input_until_a_step_is_taken(step, code, doing, tmp_path, capsys):
    def fail() -> int:
        with during("evaluating", step), during("step 8", step):
            return refuse()

    assert guarded(fail, lambda: str(tmp_path)) == code
    assert capsys.readouterr().err.endswith(f": {doing}data.path: no such file\n")
    told = json.loads((tmp_path / "status.json").read_text())
    assert told == {"code": code, "reason": f"{doing}data.path: no such file", "step": step or None}


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), GeneratorExit(), MemoryError()])
def test_whatever_is_raised_has_its_phase(error):
    with pytest.raises(PhaseError) as told, during("step 8", 7):
        raise error
    assert explain(told.value) == (f"step 8: {type(error).__name__}: {error}".strip(), 7)
    with pytest.raises(StoppedEarly), during("before the first step", None):
        raise StoppedEarly


def test_bad_input_without_a_known_directory_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert guarded(refuse) == 2
    assert not list(tmp_path.iterdir())


def test_status_that_cannot_be_written_keeps_line_and_code(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert guarded(refuse, lambda: str(blocked / "run")) == 2
    assert capsys.readouterr().err == "megalign: error: data.path: no such file\n"


def test_bugs_are_not_taken_for_bad_input(tmp_path):
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0, lambda: str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_first_failure_stays_and_the_launcher_hears_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv(RESULT_FILE, str(tmp_path / "code"))
    for rank, code in ((2, 1), (0, 2)):
        Ending(str(tmp_path / "run"), taken=True).write(code, f"rank {rank}", 4)
    assert json.loads((tmp_path / "run" / "status.json").read_text()) == {"code": 1, "reason": "rank 2", "step": 4}
    assert (tmp_path / "code").read_text() == "1\n"
    write_status(tmp_path / "run", 0, "done", 7)  # the job's own last word
    assert json.loads((tmp_path / "run" / "status.json").read_text())["code"] == 0
    assert (tmp_path / "code").read_text() == "0\n"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["status.json"]


LOST = "step 4: all_reduce of sum_over_data: RuntimeError: Connection closed by peer [127.0.0.1]:3"
CAUSES = {
    1: (1, "rank 1 of 6: step 4: ValueError: no such answer", 3),
    4: (2, "rank 4 of 6: data.jsonl:7: reward 'mine' did not return in 300 s", None),
}


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::3])
def test_many_ranks_that_fail_at_different_times_leave_the_first_cause(order, tmp_path, monkeypatch):
    """Ranks 0 and 5 only lose their peers, before, between or after the two ranks that fail by themselves."""
    monkeypatch.setenv(RESULT_FILE, str(tmp_path / "code"))
    ranks = [1, 4, 0, 5]
    for rank in (ranks[index] for index in order):
        ending = Ending(str(tmp_path / "run"), taken=True)
        ending.write(*CAUSES.get(rank, (1, f"rank {rank} of 6: {LOST}", 3)))
    first = next(ranks[index] for index in order if index < 2)
    code, reason, step = CAUSES[first]
    assert json.loads((tmp_path / "run" / "status.json").read_text()) == {"code": code, "reason": reason, "step": step}
    assert (tmp_path / "code").read_text() == f"{code}\n"


@pytest.mark.parametrize("held", [(0, "done", 7), (75, "SIGTERM", 3), (1, "rank 0", 3), (2, "no room", 3)])
def test_refusal_leaves_the_status_of_another_run_alone(held, tmp_path, capsys):
    write_status(tmp_path, *held)
    before = (tmp_path / "status.json").read_bytes()
    assert guarded(refuse, lambda: str(tmp_path)) == 2
    assert (tmp_path / "status.json").read_bytes() == before
    assert capsys.readouterr().err == "megalign: error: data.path: no such file\n"


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl", "checkpoints", "rollout.jsonl"])
def test_refusal_writes_nothing_beside_a_job_that_is_running(name, tmp_path):
    (tmp_path / name).mkdir()
    assert guarded(refuse, lambda: str(tmp_path)) == 2
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("code", [1, 2])
def test_refusal_takes_the_place_of_what_began_no_run(code, tmp_path):
    """Neither a refusal nor ranks that did not meet have taken the directory over."""
    write_status(tmp_path, code, "another mistake", None)
    assert guarded(refuse, lambda: str(tmp_path)) == 2
    assert json.loads((tmp_path / "status.json").read_text())["reason"] == "data.path: no such file"


def test_the_first_of_ranks_that_do_not_meet_is_told(tmp_path):
    """Rank 0 finds its port busy at once, which the others notice when their time is over."""
    (tmp_path / "status.json").write_text(json.dumps({"code": 2, "reason": "of yesterday", "step": None}))
    os.utime(tmp_path / "status.json", (0, 0))
    ranks = [Ending(str(tmp_path)) for _ in range(2)]
    time.sleep(0.02)  # more than a tick of the file system's clock
    ranks[0].write(2, "MASTER_PORT is 29500: another process uses it", None)
    ranks[1].write(1, "rank 0 does not answer", None)
    assert "MASTER_PORT" in json.loads((tmp_path / "status.json").read_text())["reason"]


@pytest.mark.parametrize(
    ("error", "consequence"),
    [
        (RuntimeError("[/a/pair.cc:537] Read error [127.0.0.1]:2967: Connection reset by peer"), True),
        (RuntimeError("[/a/pair.cc:554] Connection closed by peer [127.0.0.1]:3"), True),
        (RuntimeError("[/a/unbound_buffer.cc:81] Timed out waiting 10000ms for recv operation to complete"), True),
        (RuntimeError("Broken pipe"), True),
        (RuntimeError("the two passes differ by 0.2 in a token's log-prob, above run.max_pass_gap 0.1"), False),
        (RuntimeError("loss nan, gradient norm None; bad steps 1, run.max_bad_steps 0"), False),
        (ValueError("Connection reset by peer"), False),
    ],
)
def test_what_only_follows_from_another_failure(error, consequence):
    assert is_consequence(error) is consequence


def rank_of_four(rank: int, port: int, run_dir: str, delay: float) -> None:
    """Rank 2 leaves the others, and tells why `delay` seconds after they have noticed."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ending = Ending(run_dir, taken=True)

    def work(world) -> int:
        if world.rank == 2:
            if delay:
                dist.destroy_process_group()
                time.sleep(delay)
            raise KeyboardInterrupt("rank 2 has had enough")  # as code of a user's may
        while True:
            dist.all_reduce(torch.zeros(1))

    with process_group(timeout_s=60) as world:
        work_on_rank(work, world, ending)


@pytest.mark.parametrize("delay", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_status_holds_the_cause_and_not_what_followed(delay, tmp_path, capfd):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    context = multiprocessing.get_context("spawn")
    port = free_port()
    ranks = [context.Process(target=rank_of_four, args=(rank, port, str(run_dir), delay)) for rank in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [1] * 4
    reason = "rank 2 of 4: KeyboardInterrupt: rank 2 has had enough"
    assert json.loads((run_dir / "status.json").read_text()) == {"code": 1, "reason": reason, "step": None}
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("megalign: ")]
    assert f"megalign: failed: {reason}" in lines
    assert sum("ends with the rank that failed first" in line for line in lines) == 3 and len(lines) == 4
