"""Nothing that a run made is lost in silence: checkpoints through kills, earlier runs' files, others' exports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from safetensors.torch import load_file

from megalign.convert.transfer import hf_to_megatron, megatron_to_hf
from megalign.engines.saving import Saving, Written
from megalign.files import PartialFolder
from megalign.runtime.distributed import process_group
from megalign.train import loop
from megalign.train.checkpoint import Target, save_checkpoint
from megalign.train.resume_point import find_checkpoint, latest
from megalign.train.run_dir import alone_in
from tests.support.checkpoint_dirs import FACTS_OF_RUN, describe_files
from tests.support.processes import on_two_ranks
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of three steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("kept")
    write_model(folder / "model")
    write_model(folder / "speaks", tokenizer=True)
    write_lines(folder / "data.jsonl", records("samples"))
    assert train(write_config(folder, checkpoint={"every": 1, "keep": 9})) == 0
    return folder


def job_in(tmp_path: Path, folder: Path, **changes) -> Path:
    sections = {"model": {"path": str(folder / "model")}, "data": {"path": str(folder / "data.jsonl")}}
    return write_config(tmp_path, **{**sections, **changes})


@pytest.fixture
def job(folder, tmp_path):
    """A copy of that run's directory, and its configuration."""
    shutil.copytree(folder / "run", tmp_path / "run")
    return job_in(tmp_path, folder, checkpoint={"every": 1, "keep": 9})


def log_of(run_dir: Path) -> str:
    return (run_dir / "log.txt").read_text()


# checkpoints


def test_a_restart_of_a_run_from_a_named_checkpoint_loses_nothing(folder, tmp_path):
    config = job_in(tmp_path, folder, run={"steps": 6}, checkpoint={"every": 1, "keep": 1})
    named = f"checkpoint.resume={folder}/run"
    for step in (4, 5):
        assert train(config, named, NOW) == 75
        assert checkpoint_steps(tmp_path / "run") == [step]
    assert train(config, "checkpoint.resume=auto", NOW) == 0  # the last step; the run's start is not forgotten
    assert train(config, named) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [4, 5, 6]
    assert "this run has saved step_00000004 since it started from" in log_of(tmp_path / "run")
    assert checkpoint_steps(folder / "run") == [1, 2, 3]


@pytest.mark.parametrize("where", ["step_00000001", "run"])
def test_going_back_in_the_same_directory_keeps_what_was_newer(where, job, tmp_path):
    run = tmp_path / "run"
    before = metrics(run)
    named = f"checkpoint.resume={run}/checkpoints/step_00000001" if where != "run" else f"checkpoint.resume={run}"
    keep = "checkpoint.keep=1"  # and yet the checkpoint that the command names stays
    if where == "run":  # the newest one: nothing is newer
        assert train(job, named, "run.steps=4") == 0
        assert not (run / "earlier_1").exists() and checkpoint_steps(run) == [1, 2, 3, 4]
        return
    assert train(job, named, keep, NOW) == 75
    assert checkpoint_steps(run) == [1, 2] and [line["step"] for line in metrics(run)] == [1, 2]
    assert checkpoint_steps(run / "earlier_1") == [2, 3] and metrics(run / "earlier_1") == before
    assert latest(run / "earlier_1" / "checkpoints") == run / "earlier_1" / "checkpoints" / "step_00000003"
    assert train(job, named, keep) == 0
    assert checkpoint_steps(run) == [1, 3] and not (run / "earlier_2").exists()
    assert "is kept in" in log_of(run)


class Killed(BaseException):
    """Stands for the end of the process between two calls of the operating system."""


class Writer:
    """Saves two files in place of a model's."""

    def __init__(self, text: str) -> None:
        self.text = text

    def begin_save(self, folder: Path, extra: dict, *, copied: bool) -> Saving:
        def write() -> Written:
            (folder / "hf").mkdir()
            for name in ("metadata.json", "hf/config.json"):
                (folder / name).write_text(self.text)
            return Written({})

        return Saving(2 * len(self.text), write, lambda abouts: None)


def raise_killed() -> None:
    raise Killed


def die_at(monkeypatch, number: int, die=raise_killed) -> list[str]:
    """Kill the process at the `number`-th change of a name or removal of a file from now on; what was called."""
    calls: list[str] = []

    def guard(module, name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == number:
                die()
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ("rename", "replace", "rmdir", "unlink"):
        guard(os, name)
    return calls


def save_small(run_dir: Path, step: int, **changes) -> list[str]:
    about = {"keep": 2, "keep_every": 0, "spare": None, "feed": {}, **changes}
    return save_checkpoint(Writer("x"), Target(run_dir, step, replace(FACTS_OF_RUN, step=step), **about), {})


def test_damaged_checkpoints_take_no_whole_ones_place(tmp_path):
    """What a look at sizes and small files shows, and what the ranks have found when the run started."""
    with process_group(timeout_s=60.0):
        for step in range(1, 6):
            assert save_small(tmp_path, step, keep=9) == []
        folder = tmp_path / "checkpoints"
        (folder / "step_00000005" / "metadata.json").write_text("")
        save_small(tmp_path, 6, damaged=frozenset({folder / "step_00000004"}))
        assert checkpoint_steps(tmp_path) == [3, 4, 5, 6]
        save_small(tmp_path, 7, damaged=frozenset({folder / "step_00000004"}))
        assert checkpoint_steps(tmp_path) == [6, 7]


def test_what_cannot_be_dropped_hinders_no_save(tmp_path, monkeypatch):
    """One that others still read is said, one that is read-only stays as it is, and odd things with such names go."""
    folder, removed = tmp_path / "checkpoints", shutil.rmtree

    def held(path, *args, **kwargs):
        if Path(path).name == ".step_00000001.dropped":
            raise OSError(39, "Directory not empty")
        removed(path, *args, **kwargs)

    with process_group(timeout_s=60.0):
        for step in (1, 2):
            save_small(tmp_path, step)
        monkeypatch.setattr(shutil, "rmtree", held)
        assert save_small(tmp_path, 3) == [f"{folder}/.step_00000001.dropped cannot be removed: Directory not empty"]
        protected = folder / "step_00000002"
        may = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != protected / "hf" and may(path, mode))
        for name in (".step_00000001.partial", ".step_00000001.replaced", "step_00000005"):
            (folder / name).write_text("")
        (folder / "step_00000004").symlink_to("step_00000004")
        for step in (4, 5, 6):
            assert save_small(tmp_path, step) == []
        assert checkpoint_steps(tmp_path) == [2, 5, 6] and (protected / "metadata.json").is_file()
        assert [path.name for path in folder.glob(".*")] == [".step_00000001.dropped"]


def test_a_directory_is_one_jobs_at_a_time(job, tmp_path, capfd, monkeypatch):
    """Another is refused and leaves everything as it is, also what it would move aside; one that ends is awaited."""
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with ExitStack() as held:
        held.enter_context(alone_in(run, patience_s=0))
        monkeypatch.setattr(loop, "PATIENCE_S", 0.2)
        for way in ("auto", "never"):
            assert train(job, f"checkpoint.resume={way}") == 2
            told = capfd.readouterr().err
            assert "megalign: error: run.dir is " in told and "another job that runs" in told
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        monkeypatch.setattr(loop, "PATIENCE_S", 60.0)
        threading.Timer(0.5, held.pop_all().close).start()
        assert train(job, "run.steps=4") == 0 and len(metrics(run)) == 4


@pytest.mark.parametrize("again", ["the newest step", "an older step"])
def test_a_save_killed_anywhere_leaves_a_whole_checkpoint(again, tmp_path):
    def save(run_dir: Path, step: int, text: str) -> None:
        target = Target(run_dir, step, FACTS_OF_RUN, keep=2, keep_every=0, spare=None, feed={})
        save_checkpoint(Writer(text), target, {})

    def whole(run_dir: Path) -> Path:
        found = find_checkpoint(run_dir, "auto")
        assert found is not None and found.own
        names = json.loads((found.folder / "files.json").read_text())
        assert set(names) == {"metadata.json", "hf/config.json", "checkpoint.json"}
        assert names == describe_files(found.folder)
        return found.folder

    with process_group(timeout_s=60.0):
        assert dist.get_world_size() == 1
        number, done = 0, False
        while not done:
            number += 1
            run_dir = tmp_path / str(number)
            for step in (1, 2, 3):
                save(run_dir, step, f"old {step}")
            step = 3 if again == "the newest step" else 2
            with pytest.MonkeyPatch.context() as patch:
                calls = die_at(patch, number)
                try:
                    save(run_dir, step, "new")
                    done = True
                except Killed:
                    pass
            text = (whole(run_dir) / "metadata.json").read_text()
            # An older step's never counts beside the whole newest one.
            allowed = ("old 3",) if step == 2 else ("new",) if done else ("old 3", "new")
            assert text in allowed, (number, calls)
            save(run_dir, 4, "later")  # and what the kill left is cleared away
            assert whole(run_dir).name == "step_00000004"
            assert not list((run_dir / "checkpoints").glob(".*"))
            assert checkpoint_steps(run_dir) in ([2, 4], [3, 4])
        assert number > 8  # renames and removals there were


@pytest.mark.parametrize("interrupted", [True, False])
def test_an_export_killed_anywhere_leaves_a_whole_one(interrupted, tmp_path):
    number, done = 0, False
    while not done:
        number += 1
        target = tmp_path / str(number) / "hf"
        target.mkdir(parents=True)
        (target / "weights").write_text("old")
        partial = PartialFolder(target, replace=True)
        (partial.path / "weights").write_text("new")
        with pytest.MonkeyPatch.context() as patch:
            if interrupted:
                die_at(patch, number)
                try:
                    partial.publish()
                    done = True
                except Killed:
                    partial.abandon()
            else:  # in a process of its own, which ends without a word
                child = os.fork()
                if child == 0:
                    die_at(patch, number, lambda: os._exit(9))
                    partial.publish()
                    os._exit(0)
                done = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
                os.close(partial.lock)
        PartialFolder(target, replace=True).abandon()  # the next export begins, and comes to nothing
        assert (target / "weights").read_text() in ("old", "new"), number
    assert number > 3 and (target / "weights").read_text() == "new"


# what nothing would keep


def test_a_run_that_would_keep_nothing_saves_its_last_step(folder, tmp_path):
    assert train(job_in(tmp_path, folder)) == 0
    assert checkpoint_steps(tmp_path / "run") == [3]
    log = log_of(tmp_path / "run")
    told = log.index("neither checkpoint.every nor export.hf_dir is set")
    assert told < log.index("scoring") if "scoring" in log else told < log.index("step 1: ")


def test_an_export_is_enough(folder, tmp_path):
    assert train(job_in(tmp_path, folder, export={"hf_dir": str(tmp_path / "out")})) == 0
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert "neither" not in log_of(tmp_path / "run")


# earlier runs in the same directory


def test_a_run_without_checkpoints_is_kept_aside(folder, tmp_path):
    config = job_in(tmp_path, folder, export={"hf_dir": str(tmp_path / "run" / "hf")}, run={"dump_steps": [1]})
    run = tmp_path / "run"
    assert train(config) == 0
    kept = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    del kept[Path("status.json")]
    assert train(config, "optimizer.lr=1e-2") == 0
    for path, content in kept.items():
        assert (run / "earlier_1" / path).read_bytes() == content, path
    assert metrics(run)[0]["lr"] == 1e-2 and "held an earlier run" in log_of(run)
    assert train(config, "optimizer.lr=1e-2") == 0
    assert [line["lr"] for line in metrics(run / "earlier_2")] == [1e-2] * 3 and (run / "earlier_1").is_dir()


def test_beginning_anew_keeps_the_earlier_run_whole(job, tmp_path):
    run = tmp_path / "run"
    assert train(job, "checkpoint.resume=never", "run.steps=1", "optimizer.lr=1e-2") == 0
    assert checkpoint_steps(run) == [1] and checkpoint_steps(run / "earlier_1") == [1, 2, 3]
    # It is a run directory of its own.
    other = f"run.dir={tmp_path}/other"
    assert train(job, f"checkpoint.resume={run}/earlier_1/checkpoints/latest", other, "run.steps=4") == 0
    assert [line["step"] for line in metrics(tmp_path / "other")] == [4]


def test_an_attempt_that_trained_nothing_leaves_nothing_aside(folder, tmp_path):
    config = job_in(tmp_path, folder)
    assert train(config, "run.max_pass_gap=auto", "export.hf_dir=/proc/none") == 2
    assert train(config) == 0 and not (tmp_path / "run" / "earlier_1").exists()


def test_a_config_file_of_the_users_is_not_written_over(folder, tmp_path, capfd):
    """A job whose configuration is called config.yaml and whose run.dir is the directory around it."""
    (tmp_path / "run").mkdir()
    own = job_in(tmp_path, folder).rename(tmp_path / "run" / "config.yaml")
    text = "# mine\n" + own.read_text()
    own.write_text(text)
    assert train(own, "run.steps=1") == 2
    told = capfd.readouterr().err
    assert "config.yaml in it was not written by a run" in told and told.count("\n") == 1
    assert own.read_text() == text and not (tmp_path / "run" / "log.txt").exists()
    # What a run wrote there starts it again.
    assert train(own, "run.steps=1", f"run.dir={tmp_path}/other") == 0
    assert train(tmp_path / "other" / "config.yaml", "run.steps=2") == 0


# exports


def test_another_jobs_export_is_refused(folder, tmp_path, capfd):
    config = job_in(tmp_path, folder, export={"hf_dir": str(tmp_path / "out")})
    assert train(config) == 0
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    for change in (f"run.dir={tmp_path}/second", "optimizer.lr=1e-2"):
        capfd.readouterr()
        assert train(config, change) == 2
        told = capfd.readouterr().err
        assert "export.hf_dir is " in told and "an earlier export of this run" in told and told.count("\n") == 1
        assert f"run.dir is {tmp_path}/run" in told or "before its settings or data changed" in told
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["status.json"]


def test_a_run_replaces_its_own_exports(folder, tmp_path):
    """By `export.every`, after a restart with and without a checkpoint, with an allowed change, and moved."""
    config = job_in(tmp_path, folder, export={"hf_dir": str(tmp_path / "out"), "every": 1}, run={"steps": 2})
    assert train(config) == 0 and train(config) == 0
    assert train(config, "checkpoint.every=1", "run.steps=3") == 0
    allowed = ("optimizer.lr=1e-2", "checkpoint.allow=[optimizer.lr]")
    assert train(config, *allowed, "run.steps=4") == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    assert train(config, *allowed, f"run.dir={tmp_path}/moved", "run.steps=5") == 0
    assert [line["step"] for line in metrics(tmp_path / "moved")] == [1, 2, 3, 4, 5]


BAD_TARGETS = {
    "{tmp}/file/hf": "Not a directory",
    "/proc/none/hf": "cannot be written",
    "/sys/none/hf": "cannot be written",
    "{tmp}/" + "long" * 80: "names of up to 255 bytes",
    "{tmp}/run": "the run's own files",
    "{tmp}": "the run's own files",
    "{tmp}/run/checkpoints/hf": "the run's own files",
    "{tmp}/run/metrics.jsonl": "the run's own files",
    "{tmp}/run/rollout.jsonl": "the run's own files",
    "{tmp}/run/earlier_1/hf": "the run's own files",
    "{{run_dir}}/hf": "{run_dir} is no known placeholder",
    "{{model.path}}/hf": "{model.path} is no known placeholder",
    "{{ run.dir }}/hf": "{ run.dir } is no known placeholder",
    "{{run.dir/hf": "{run.dir is no known placeholder",
    "{{{{run.dir}}}}/hf": "{{run.dir}} is no known placeholder",
    "{tmp}/readonly/deep/hf": "Read-only file system",
}


@pytest.mark.parametrize("target", BAD_TARGETS)
def test_an_export_that_must_fail_is_refused_first(target, folder, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    if "readonly" in target:
        (tmp_path / "readonly").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(tmp_path / "readonly")]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("nothing may be mounted here")
    try:
        assert train(job_in(tmp_path, folder), f"export.hf_dir={target.format(tmp=tmp_path)}") == 2
    finally:
        if "readonly" in target:
            subprocess.run(["umount", str(tmp_path / "readonly")], check=True)
    told = capfd.readouterr().err
    told = told.replace("command line: ", "")
    assert told.startswith("megalign: error: export.hf_dir is ") and told.count("\n") == 1
    assert BAD_TARGETS[target].lower() in told.lower(), told
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_disk_without_room_is_refused_first(folder, tmp_path, capfd):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        # 17,632 weights: 2 x (4 attention matrices of 32 x 32, 16 x 32 and 3 of 48 x 32, 2 norms) + 2 x 53 x 32 + 32
        size = 4 * (2 * (2 * 1024 + 2 * 512 + 3 * 1536 + 64) + 2 * 53 * 32 + 32) / 1e6
        assert train(job_in(tmp_path, folder), f"export.hf_dir={small}/hf") == 2
        assert f"an export takes {size:.2f} MB, " in capfd.readouterr().err
        assert train(job_in(tmp_path, folder), f"run.dir={small}/run") == 2
        # Each weight in the model, in the optimizer and as two moments; embedding and head have 128 rows there.
        saved = 4 * (size + 4 * 2 * (128 - 53) * 32 / 1e6)
        assert f"a checkpoint takes {saved:.2f} MB, " in capfd.readouterr().err
        assert not (small / "run" / "metrics.jsonl").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def spoiled_job(tmp_path: Path, folder: Path, *, every: int) -> Path:
    """A job of two rounds, four steps, during which somebody's file comes up where it exports to."""
    sections = round_sections(tmp_path)
    prompts = read_lines(tmp_path / "prompts.jsonl")
    write_lines(tmp_path / "prompts.jsonl", [one | {"spoil": str(tmp_path / "out")} for one in prompts])
    sections["model"] = {"path": str(folder / "speaks")}
    return write_config(tmp_path, **sections, export={"hf_dir": str(tmp_path / "out"), "every": every})


def check_spoiled(tmp_path: Path) -> None:
    """The job went on to its end, kept its last step and told how to export it."""
    run, kept = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_00000004"
    assert len(metrics(run)) == 4 and checkpoint_steps(run) == [4]
    told = status(run)
    assert told["code"] == 1 and told["step"] == 4
    assert f"the export to {tmp_path}/out failed: {tmp_path}/out exists and is not empty" in told["reason"]
    assert f"step 4 is kept in {kept}: python -m megalign export {kept} OUT_HF_DIR" in told["reason"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "somebody's"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["notes.txt"]
    assert not list(tmp_path.glob(".out*"))


def test_an_export_that_fails_at_the_end_keeps_a_checkpoint(folder, tmp_path, capfd):
    config = spoiled_job(tmp_path, folder, every=3)
    assert train(config) == 1
    check_spoiled(tmp_path)
    log = log_of(tmp_path / "run")
    assert log.count("training goes on") == 1 and "Traceback" not in capfd.readouterr().err
    # Both ways on lead to the same model.
    shutil.rmtree(tmp_path / "out")
    kept = tmp_path / "run" / "checkpoints" / "step_00000004"
    megatron_to_hf(kept, tmp_path / "converted")
    assert train(config) == 0 and len(metrics(tmp_path / "run")) == 4
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "converted"))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_every_rank_hears_of_a_failed_export(folder, tmp_path):
    config = spoiled_job(tmp_path, folder, every=0)
    lines = on_two_ranks(tmp_path, [(["train", str(config)], 1)])
    check_spoiled(tmp_path)
    assert "Traceback" not in lines


def test_paths_may_name_the_run_directory(folder, tmp_path):
    """The export moves with `run.dir`, so two jobs of one file do not meet."""
    config = job_in(tmp_path, folder, export={"hf_dir": "{run.dir}/hf"})
    for name in ("first", "second"):
        assert train(config, f"run.dir={tmp_path}/{name}", "run.steps=1") == 0
        assert (tmp_path / name / "hf" / "model.safetensors").is_file()
        resolved = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        assert resolved["export"]["hf_dir"] == f"{tmp_path}/{name}/hf"
    other = f"run.dir={tmp_path}/third"
    assert train(config, other, "run.steps=2", "data.path={run.dir}/../first/data.jsonl") == 2
    shutil.copyfile(folder / "data.jsonl", tmp_path / "first" / "data.jsonl")
    assert train(config, other, "run.steps=2", "data.path={run.dir}/../first/data.jsonl") == 0
    assert train(config, other, "checkpoint.resume={run.dir}/../second") == 2  # which has no checkpoint


def test_a_restart_of_a_run_from_converted_weights_keeps_their_reference(folder, tmp_path, capfd):
    """The reference is the policy that the run began with, after a restart too."""
    write_model(tmp_path / "other", seed=5)
    hf_to_megatron(str(tmp_path / "other"), tmp_path / "converted")
    config = job_in(tmp_path, folder)
    named = f"checkpoint.resume={tmp_path}/converted"
    assert train(config, named, f"run.dir={tmp_path}/whole") == 0
    assert train(config, named, NOW) == 75 and train(config, named, NOW) == 75 and train(config, named) == 0
    assert numbers(metrics(tmp_path / "run")) == numbers(metrics(tmp_path / "whole"))
    capfd.readouterr()
    assert train(config, "run.steps=4") == 2  # the reference would be model.path's
    assert "checkpoint.resume was " in capfd.readouterr().err
    assert train(config, named, "run.steps=4") == 0
