"""What a job reports when a rank stops, hangs, dies or raises; and that all ranks end."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.faults import Ended, run_job
from tests.support.mounts import missing, mounted
from tests.support.tiny_jobs import checkpoint_steps, metrics, records, status, write_config, write_lines, write_model

TIMEOUT_S = 12
RECORDER = "TORCH_FR_BUFFER_SIZE"
# The fault, and the rank that has it: rank 0 serves the store in which the ranks give signs of life.
HANGS = {
    "stopped": ("stop", 1),
    "store": ("stop", 0),
    "interpreter": ("gil", 1),
    "asleep": ("sleep", 1),
    "dozing": ("sleep_and_stop", 1),  # shortly before the time-out
}
ENDS_S = 150  # a start on a busy machine, the time-out, the report


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_model(folder / "model")
    write_lines(folder / "data.jsonl", records("singles"))
    return folder


def faulty(folder: Path, tmp_path: Path, fault: str, *overrides: str, rank: int = 1, call: int = 3) -> Ended:
    """Run a job of 50 steps on two ranks; one goes wrong in the second: the loss is called before the first, too."""
    config = write_config(
        tmp_path,
        model={"path": str(folder / "model")},
        data={"path": str(folder / "data.jsonl")},
        run={"steps": 50},
        loss={"name": "tests.support.faults:faulty", "fault": fault, "rank": rank, "call": call},
        watchdog={"timeout_s": TIMEOUT_S},
    )
    return run_job(tmp_path, ["train", str(config), *overrides])


@pytest.fixture(scope="module")
def hung(folder, tmp_path_factory):
    """Return {name: (how a job of which a rank hangs ended, its directory)}; the jobs wait beside each other."""
    places = {name: tmp_path_factory.mktemp(name) for name in HANGS}
    before = os.environ.get(RECORDER)
    os.environ[RECORDER] = "2000"  # as launch/environment.sh does
    try:
        with ThreadPoolExecutor(len(HANGS)) as pool:
            jobs = {
                name: pool.submit(faulty, folder, places[name], fault, rank=rank)
                for name, (fault, rank) in HANGS.items()
            }
            return {name: (job.result(), places[name]) for name, job in jobs.items()}
    finally:
        os.environ.pop(RECORDER)
        os.environ.update({} if before is None else {RECORDER: before})


def test_a_rank_that_was_stopped_is_named_by_the_other(hung):
    ended, place = hung["stopped"]
    assert ended.codes == [1, -9] and ended.seconds < ENDS_S, ended
    held = status(place / "run")
    assert held["code"] == 1 and held["step"] == 1
    assert held["reason"].startswith("rank 1 of 2 gave no sign of life for 12 s (watchdog.timeout_s), the last in ")
    assert " is stopped (SIGSTOP, or a debugger); rank 0 of 2 in step 2, waiting in " in held["reason"]
    summary = (place / "run/watchdog/summary.txt").read_text()
    assert held["reason"].split(";")[0] in summary and summary.count("\nrank ") == 2
    stacks = (place / "run/watchdog/rank_0.txt").read_text()
    assert "distributed_c10d.py" in stacks and "megalign/train/loop.py" in stacks


def test_a_rank_whose_store_all_use_is_named_when_it_is_stopped(hung):
    ended, place = hung["store"]
    assert ended.codes == [-9, 1] and ended.seconds < ENDS_S, ended
    held = status(place / "run")
    assert held["reason"].startswith(
        "rank 0 of 2, or the launcher that serves the job's store, gave no answer for 12 s "
    )
    assert " in step 2: process " in held["reason"] and " is stopped (SIGSTOP, or a debugger)" in held["reason"]
    assert "distributed_c10d.py" in (place / "run/watchdog/rank_1.txt").read_text()


def test_a_rank_that_holds_the_interpreter_is_named_with_its_stack(hung):
    ended, place = hung["interpreter"]
    assert ended.codes == [1, -9] and ended.seconds < ENDS_S, ended
    held = status(place / "run")
    assert held["reason"].startswith("rank 1 of 2 gave no sign of life for 12 s (watchdog.timeout_s), the last in ")
    assert " runs, but something in it holds Python's interpreter lock (GIL)" in held["reason"]
    assert "in go_wrong" in (place / "run/watchdog/rank_1.txt").read_text()


def test_a_rank_that_hangs_is_told_from_the_one_that_waits_for_it(hung):
    ended, place = hung["asleep"]
    assert ended.codes == [1, 1] and ended.seconds < ENDS_S, ended
    held = status(place / "run")
    assert held["reason"].startswith("rank 1 of 2 made no progress for 12 s (watchdog.timeout_s) in step 2; rank 0 ")
    assert "; rank 0 of 2 in step 2, waiting in " in held["reason"] and held["step"] == 1
    assert "in go_wrong" in (place / "run/watchdog/rank_1.txt").read_text()
    recorded = json.loads((place / "run/watchdog/rank_0.collectives.json").read_text())
    assert "gloo:all_reduce" in {each["profiling_name"] for each in recorded["entries"]}


def test_a_rank_that_is_stopped_after_it_hung_is_ended_too(hung):
    ended, place = hung["dozing"]
    assert ended.codes == [1, -9] and ended.seconds < ENDS_S, ended
    held = status(place / "run")
    assert held["reason"].startswith("rank 1 of 2 made no progress for 12 s (watchdog.timeout_s) in step 2; rank 0 ")
    assert " is stopped (SIGSTOP" in (place / "run/watchdog/summary.txt").read_text()


@pytest.mark.parametrize("fault", ["abort", "kill"])
def test_a_rank_that_dies_is_named_by_the_other(fault, folder, tmp_path):
    ended = faulty(folder, tmp_path, fault)
    assert ended.codes == [1, -6 if fault == "abort" else -9] and ended.seconds < ENDS_S, ended
    held = status(tmp_path / "run")
    assert held["reason"].startswith("rank 1 of 2: process ") and " has ended without a word; rank 0 " in held["reason"]
    assert "waited for it in step 2: " in held["reason"] and held["step"] == 1
    assert f"megalign: failed: {held['reason']}" in ended.told


def test_a_rank_that_raises_is_the_first_to_be_told(folder, tmp_path):
    ended = faulty(folder, tmp_path, "raise")
    assert set(ended.codes) <= {1, 2} and ended.seconds < ENDS_S, ended
    held = status(tmp_path / "run")
    assert "step 2: rank 1 of 2: " in held["reason"] and "the loss has had enough" in held["reason"]


def test_a_bit_that_differs_between_tensor_ranks_ends_the_job(folder, tmp_path):
    ended = faulty(folder, tmp_path, "ulp", "parallel.tensor=2", "watchdog.check_every=5", "run.steps=12")
    assert ended.codes == [1, 1], ended
    held = status(tmp_path / "run")
    assert "after step 5: RuntimeError: parameter decoder.layers.1.input_layernorm.weight: " in held["reason"]
    assert held["reason"].endswith(": tensor ranks must have the same bits, but rank 0 and rank 1 differ")
    assert held["step"] == 5 and not (tmp_path / "run/checkpoints").exists()


@pytest.mark.slow
def test_a_rank_that_is_slow_but_beats_is_waited_for(folder, tmp_path):
    """Twenty seconds in a step are well within a time-out of 40."""
    ended = faulty(folder, tmp_path, "slow", "watchdog.timeout_s=40", "run.steps=4")
    assert ended.codes == [0, 0], ended
    assert len(metrics(tmp_path / "run")) == 4 and not (tmp_path / "run/watchdog").exists()


@pytest.mark.slow
def test_a_rank_that_is_killed_while_it_writes_a_checkpoint_costs_only_that_one(folder, tmp_path):
    write = ["checkpoint.every=4", f"loss.folder={tmp_path}/run", "run.steps=12"]
    ended = faulty(folder, tmp_path, "die_while_saving", *write, call=12)
    assert ended.codes == [1, -9] and "saving step 8" in status(tmp_path / "run")["reason"], ended
    assert checkpoint_steps(tmp_path / "run") == [4]
    ended = faulty(folder, tmp_path, "none", *write, "checkpoint.allow=[loss.fault,loss.call]")
    assert ended.codes == [0, 0] and "resumed from" in ended.told, ended
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 13))
    assert not list((tmp_path / "run/checkpoints").glob(".step_*"))


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_disk_that_is_full_costs_no_checkpoint_that_was_whole(folder, tmp_path):
    run_dir = tmp_path / "run"
    with mounted(run_dir, "size=4m"):
        write = ["checkpoint.every=4", f"loss.folder={run_dir}", "run.steps=12"]
        ended = faulty(folder, tmp_path, "fill", *write, call=12)
        assert None not in ended.codes and len(set(ended.codes)) == 1, ended
        assert "No space left" in ended.told or "are free" in ended.told
        assert 4 in checkpoint_steps(run_dir) and (run_dir / "checkpoints" / "latest").exists()
        (run_dir / "filler").unlink()
        ended = faulty(folder, tmp_path, "none", *write, "checkpoint.allow=[loss.fault,loss.call]")
        assert ended.codes == [0, 0], ended
        assert [line["step"] for line in metrics(run_dir)] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_disk_that_is_full_at_the_export_keeps_the_model(folder, tmp_path):
    with mounted(tmp_path / "disk", "size=1m") as disk:
        write = [f"export.hf_dir={disk}/hf", f"loss.folder={disk}", "run.steps=6"]
        ended = faulty(folder, tmp_path, "fill", *write)
        assert ended.codes == [1, 1], ended
        held, kept = status(tmp_path / "run"), tmp_path / "run/checkpoints/step_00000006"
        assert held["step"] == 6 and f"the export to {disk}/hf failed" in held["reason"]
        assert f"step 6 is kept in {kept}" in held["reason"] and kept.is_dir()
        assert [path.name for path in disk.iterdir()] == ["filler"]
        (disk / "filler").unlink()
        ended = faulty(folder, tmp_path, "none", *write, "checkpoint.allow=[loss.fault]")
        assert ended.codes == [0, 0] and (disk / "hf" / "model.safetensors").is_file(), ended
        assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 7))


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_directory_that_cannot_be_written_is_refused(folder, tmp_path):
    with mounted(tmp_path / "disk", "size=1m,ro") as disk:
        ended = faulty(folder, tmp_path, "none", f"run.dir={disk}/run")
    assert ended.codes == [2, 2], ended
    assert f"run.dir is '{disk}/run': Read-only file system; must be a directory that can be written" in ended.told
