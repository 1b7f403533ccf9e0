"""Saves that fail leave training going and the last good checkpoint; saves beside training change no number."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from megalign.convert.megatron.torch_dist import COMMON
from megalign.engines.saving import Saving, Written
from megalign.files import CheckedFile, checksum
from megalign.runtime.distributed import process_group
from megalign.schema import UserError
from megalign.train.metrics_file import MetricsFile
from megalign.train.resume_point import latest
from megalign.train.saves import save, settle
from tests.support.processes import on_two_ranks, run_ranks
from tests.support.tiny_jobs import (
    NOW,
    checkpoint_steps,
    metrics,
    numbers,
    read_lines,
    records,
    round_sections,
    status,
    train,
    write_config,
    write_lines,
    write_model,
)

TOO_SMALL = 100_000  # bytes that a file may have: more than logs and metrics, less than a rank's part of a checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saves")
    write_model(folder / "model", tokenizer=True)
    write_lines(folder / "data.jsonl", records("samples"))
    write_config(folder, checkpoint={"every": 1, "keep": 9})
    return folder


def files_may_have(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def test_the_checksum_is_that_of_the_file(tmp_path):
    """In blocks of any size, also such as are checked in a thread, and read back."""
    written = CheckedFile(tmp_path / "a")
    for content in (b"", b"abc", os.urandom(5000), memoryview(torch.arange(9_000_000).numpy()).cast("B")):
        written.write(content)
    written.close()
    assert written.size == (tmp_path / "a").stat().st_size == 3 + 5000 + 72_000_000
    assert written.crc == checksum(tmp_path / "a")


def test_a_disk_that_is_full_for_a_while(folder, tmp_path):
    """One checkpoint fits, two do not: the first stays, training goes on, and the end says that it is not saved."""
    run = tmp_path / "run"
    run.mkdir()
    job = [folder / "job.yaml", f"run.dir={run}", "checkpoint.keep=1"]
    assert train(folder / "job.yaml", f"run.dir={tmp_path}/whole", "checkpoint.keep=1") == 0
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(run)], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        assert train(*job, "run.steps=1") == 1  # no room for any
        needed = float(re.search(r"it takes ([\d.]+) MB", status(run)["reason"])[1]) * 1e6
        assert "there is none" in (run / "log.txt").read_text()
        subprocess.run(["mount", "-o", f"remount,size={int(needed) + 200_000}", str(run)], check=True)
        assert train(*job) == 1
        log = (run / "log.txt").read_text()
        for step in (2, 3):
            said = (
                f"warning: step {step} is not saved: {run}/checkpoints/step_0000000{step} cannot be written: it takes"
            )
            assert said in log, log
        assert "MB are free there; the last good one is " in log
        assert log.count("training goes on, and the next save tries again") == 1
        assert checkpoint_steps(run) == [1] and not list((run / "checkpoints").glob(".*"))
        assert numbers(metrics(run)) == numbers(metrics(tmp_path / "whole"))
        assert status(run)["reason"].startswith("step 3 is not saved: ") and status(run)["step"] == 3
        # With room again, the same command goes on from the good one.
        subprocess.run(["mount", "-o", f"remount,size={3 * int(needed)}", str(run)], check=True)
        assert train(*job) == 0 and checkpoint_steps(run) == [3]
        assert f"resumed from {run}/checkpoints/step_00000001" in (run / "log.txt").read_text()
    finally:
        subprocess.run(["umount", "-l", str(run)], check=True)  # the log is still open


def fails_on_rank_1(job: str, run: str) -> None:
    from megalign.__main__ import main

    if os.environ["RANK"] == "1":
        files_may_have(TOO_SMALL)
    assert main(["train", job, f"run.dir={run}", "parallel.tensor=2", "checkpoint.every=2"]) == 1


def test_one_rank_that_cannot_write_fails_the_save_on_all(folder, tmp_path):
    run = tmp_path / "run"
    run_ranks(fails_on_rank_1, 2, str(folder / "job.yaml"), str(run))
    log = (run / "log.txt").read_text()
    assert "warning: step 2 is not saved: " in log and "__1_0.distcp cannot be written: File too large; there is" in log
    assert checkpoint_steps(run) == [] and not list((run / "checkpoints").glob(".*"))
    assert len(metrics(run)) == 3 and "step 3 is not saved" in status(run)["reason"]


def test_metrics_that_a_full_disk_refuses_are_written_later(folder, tmp_path):
    """With them no checkpoint, which would outlive its steps' lines."""
    whole = MetricsFile(tmp_path / "whole.jsonl")
    for step in range(3):
        whole.add({"step": step, "text": "x" * 50})
    waits = MetricsFile(tmp_path / "waits.jsonl")
    try:
        for step, room in enumerate((1000, 100, 1000)):  # a line has 72 bytes
            files_may_have(room)
            if room > 100:
                waits.add({"step": step, "text": "x" * 50})
                continue
            for write in (lambda: waits.add({"step": 1, "text": "x" * 50}), waits.keep):
                with pytest.raises(UserError, match=r"waits.jsonl cannot be written: File too large"):
                    write()
                assert len(read_lines(tmp_path / "waits.jsonl")) == 1
    finally:
        files_may_have(resource.RLIM_INFINITY)
    assert (tmp_path / "waits.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_signal_or_time_limit_whose_save_fails_is_no_success(folder, tmp_path):
    files_may_have(TOO_SMALL)
    try:
        assert train(folder / "job.yaml", f"run.dir={tmp_path}/run", NOW, "checkpoint.every=0") == 1
    finally:
        files_may_have(resource.RLIM_INFINITY)
    reason = status(tmp_path / "run")["reason"]
    assert reason.startswith("run.max_minutes is over, but step 1 is not saved: "), reason


# beside training


@pytest.fixture(scope="module")
def beside(folder, tmp_path_factory):
    """A job with each engine whose checkpoints are written beside training, and the same at once."""
    made = tmp_path_factory.mktemp("beside")
    launched = []
    for name, more in {"megatron": ["parallel.tensor=2"], "deepspeed": ["engine.name=deepspeed"]}.items():
        for way in ("true", "false"):
            run = [f"run.dir={made}/{name}_{way}", f"export.hf_dir={made}/{name}_{way}_hf", f"checkpoint.async={way}"]
            launched.append((["train", str(folder / "job.yaml"), *more, *run], 0))
        resumed = [f"run.dir={made}/{name}_on", f"checkpoint.resume={made}/{name}_true/checkpoints/step_00000002"]
        launched.append((["train", str(folder / "job.yaml"), *more, *resumed], 0))
    launched.append((["train", str(folder / "job.yaml"), *more, "parallel.tensor=2", "checkpoint.async=true"], 2))
    (made / "told").write_text(on_two_ranks(made, launched))
    return made


@pytest.mark.parametrize("name", ["megatron", "deepspeed"])
def test_saving_beside_training_changes_nothing(name, beside):
    there, at_once = (beside / f"{name}_{way}" for way in ("true", "false"))
    assert numbers(metrics(there)) == numbers(metrics(at_once))
    assert checkpoint_steps(there) == checkpoint_steps(at_once) == [1, 2, 3]
    mine, theirs = (load_file(f"{run}_hf/model.safetensors") for run in (there, at_once))
    assert all(torch.equal(mine[key], tensor) for key, tensor in theirs.items())
    for step in (1, 2, 3):
        listed = [json.loads((run / f"checkpoints/step_{step:08d}/files.json").read_text()) for run in (there, at_once)]
        parts = [{name: found for name, found in each.items() if name.endswith((".distcp", "rs"))} for each in listed]
        assert parts[0] == parts[1] and parts[0]
    assert numbers(metrics(beside / f"{name}_on")) == numbers(metrics(there))[2:]
    took = [line for line in metrics(there) if "checkpoint_seconds" in line]
    assert took and all(0 < line["checkpoint_stall_seconds"] <= line["checkpoint_seconds"] for line in took)
    assert "of which training waited" in (there / "log.txt").read_text()


def test_what_cannot_go_beside_is_refused(beside):
    told = (beside / "told").read_text()
    assert "checkpoint.async is True: parallel.tensor is 2, and engine.name deepspeed joins" in told


class Slow:
    """Writes only when it is let."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.let, self.problem = threading.Event(), ""

    def begin_save(self, folder: Path, extra: dict, *, copied: bool) -> Saving:
        def write() -> Written:
            assert not copied or self.let.wait(60)
            if self.problem:
                raise UserError(self.problem)
            (folder / "extra.json").write_text(json.dumps(extra))
            return Written({})

        return Saving(100, write, lambda abouts: None)

    def max_over_job(self, value: float) -> float:
        return value


def slow_job(run_dir: Path) -> SimpleNamespace:
    said: list[str] = []
    cfg = SimpleNamespace(
        checkpoint=SimpleNamespace(async_save=True, keep=1, keep_every=0),
        engine=SimpleNamespace(name="megatron"),
        model=SimpleNamespace(path="m"),
        lora=None,
        model_dump=lambda **_: {},
    )
    return SimpleNamespace(
        cfg=cfg, engine=Slow(), run_dir=run_dir, step=1, bad_steps=0, num_steps=9, pending=None, saved=None, unsaved="",
        start=SimpleNamespace(job={}, started_from=None), feed=SimpleNamespace(state=dict), holds_step=False,
        world=SimpleNamespace(is_main=True), limit=SimpleNamespace(saved=lambda seconds: None), save_times={},
        versions={}, damaged=set(),
        report=SimpleNamespace(say=said.append, warn=said.append, keep=lambda: None), said=said,
    )  # fmt: skip


def test_training_goes_on_until_all_is_written(tmp_path):
    with process_group(timeout_s=60.0):
        job = slow_job(tmp_path)
        assert save(job) == "" and job.pending is not None
        settle(job, wait=False)
        assert job.pending is not None and checkpoint_steps(tmp_path) == []  # nothing waits for it
        job.engine.let.set()
        while job.pending is not None:
            settle(job, wait=False)
            time.sleep(0.01)
        assert checkpoint_steps(tmp_path) == [1] and job.saved.name == "step_00000001"
        assert 0 < job.save_times["checkpoint_stall_seconds"] < job.save_times["checkpoint_seconds"]
        # The next one is given up for the one after it only when it has failed; the good one stays meanwhile.
        job.step, job.engine.problem = 2, "no room"
        assert save(job) == ""
        settle(job, wait=True)
        assert job.unsaved == "step 2 is not saved: no room" and checkpoint_steps(tmp_path) == [1]
        assert job.said[-1].endswith("; training goes on, and the next save tries again")
        job.step, job.engine.problem = 3, ""
        assert save(job) == "" and save(job, last=True) == ""
        assert checkpoint_steps(tmp_path) == [3] and job.unsaved == ""


# the round in progress


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_the_round_in_progress_is_a_file(engine, folder, tmp_path):
    """It is written once, and where an earlier version has left it beside the step, it is found there."""
    job = tmp_path / "job"
    job.mkdir()
    sections = round_sections(job)
    model = {"model": {"path": str(folder / "model")}, "engine": {"name": engine}, "loss": {"name": "grpo"}}
    config = write_config(job, **{**sections, **model})
    assert train(config, f"run.dir={tmp_path}/whole") == 0
    assert train(config, f"run.dir={tmp_path}/run", NOW) == 75
    checkpoint = tmp_path / "run/checkpoints/step_00000001"
    state = json.loads((checkpoint / "round.json").read_text())
    assert state["round_number"] == 0 and len(state["records"]) == 4
    plain = checkpoint / (COMMON if engine == "megatron" else "extra.pt")
    held = torch.load(plain, weights_only=True)
    extra = held["extra"] if engine == "megatron" else held
    assert extra == {"step": 1, "bad_steps": 0}
    # as it was
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    before = tmp_path / "old/checkpoints/step_00000001"
    extra["feed"] = state
    torch.save(held, before / plain.name)
    for name in ("round.json", "files.json"):
        (before / name).unlink()
    (before / "files.json").write_text(
        json.dumps({str(p.relative_to(before)): p.stat().st_size for p in before.rglob("*") if p.is_file()})
    )
    for run in ("run", "old"):
        assert train(config, f"run.dir={tmp_path}/{run}") == 0
        assert numbers(metrics(tmp_path / run)) == numbers(metrics(tmp_path / "whole"))
    assert "resumed from" in (tmp_path / "old" / "log.txt").read_text()


# without checkpoint.every


def test_long_runs_save_unasked(folder, tmp_path):
    export = f"export.hf_dir={tmp_path}/hf"
    assert train(folder / "job.yaml", f"run.dir={tmp_path}/run", export, "run.steps=201", "checkpoint.every=none") == 0
    assert checkpoint_steps(tmp_path / "run") == [200, 201]
    assert "checkpoint.every is not set: a checkpoint every 200 steps" in (tmp_path / "run/log.txt").read_text()
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 201


def test_the_last_step_is_on_the_disk_while_it_is_exported(folder, tmp_path):
    """And no longer: only what was there before stays, and `latest` names it."""
    run = tmp_path / "run"
    job = [folder / "job.yaml", f"run.dir={run}", f"export.hf_dir={tmp_path}/hf", "checkpoint.every=none"]
    assert train(*job, NOW) == 75
    assert train(*job) == 0
    assert checkpoint_steps(run) == [1] and latest(run / "checkpoints") == run / "checkpoints" / "step_00000001"
    log = (run / "log.txt").read_text()
    last = f"{run}/checkpoints/step_00000003"
    assert log.index(f"saved {last}") < log.index("exported ") < log.index(f"removed {last}, since")
    # Where there is no room for it, the export goes ahead.
    files_may_have(TOO_SMALL)
    try:
        assert train(*job, f"run.dir={tmp_path}/other", f"export.hf_dir={tmp_path}/other_hf") == 0
    finally:
        files_may_have(resource.RLIM_INFINITY)
    assert checkpoint_steps(tmp_path / "other") == []
    assert "step 3 is not saved" in (tmp_path / "other/log.txt").read_text()
