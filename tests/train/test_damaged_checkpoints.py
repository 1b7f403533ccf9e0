"""A run goes on from the newest checkpoint that is whole, of either engine, and says in a line why not from others."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megalign.config.job import load_config
from megalign.runtime.distributed import process_group
from megalign.schema import UserError
from megalign.train import checkpoint_files
from megalign.train.check import check
from megalign.train.checkpoint_facts import Damaged
from megalign.train.checkpoint_files import check_share
from megalign.train.outputs import Start, job_date, with_date
from megalign.train.resume_point import find_checkpoint, find_newest
from megalign.train.starting import agree_on_start
from tests.support.checkpoint_dirs import describe_files, write_checkpoint
from tests.support.processes import on_two_ranks
from tests.support.tiny_jobs import metrics, numbers, records, train, write_config, write_lines, write_model

ENGINES = {"megatron": [], "deepspeed": ["engine.name=deepspeed", "engine.zero.stage=2"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of three steps of each engine, with a checkpoint after steps 2 and 3, and inputs of other jobs."""
    folder = tmp_path_factory.mktemp("damaged")
    write_model(folder / "model", tokenizer=True)
    write_model(folder / "narrow", hidden_size=16)
    write_lines(folder / "data.jsonl", records("samples"))
    write_lines(folder / "other.jsonl", records("samples")[::-1])
    config = write_config(folder, checkpoint={"every": 1, "keep": 2})
    for name, engine in ENGINES.items():
        assert train(config, *engine, f"run.dir={folder}/{name}") == 0
    return folder


def job_of(folder: Path, engine: str, run: Path, *overrides: str):
    cfg = load_config(str(folder / "job.yaml"), [*ENGINES[engine], f"run.dir={run}", "run.steps=4", *overrides])
    with process_group(timeout_s=60.0) as world:
        cfg = with_date(cfg, job_date(cfg))
        return agree_on_start(cfg, check(cfg, 1), world)


def whole_one(holder: Path) -> tuple[str | None, str]:
    """The newest whole checkpoint's name as two ranks find it, and what is said of newer ones."""
    damaged: dict[Path, str] = {}
    while (found := find_newest(holder, damaged)).folder is not None:
        for rank in range(2):
            try:
                check_share(found.folder, rank=rank, num_ranks=2)
            except Damaged as error:
                damaged[found.folder] = str(error)
        if found.folder not in damaged:
            return found.folder.name, " | ".join(found.problems)
    return None, " | ".join(found.problems)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def blank(path: Path) -> None:
    content = path.read_bytes()
    begin = len(content) // 3
    path.write_bytes(content[:begin] + bytes(len(content) // 3) + content[begin + len(content) // 3 :])


def instead(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


EVERY_FILE: dict[str, Callable[[Path], object]] = {
    "half of it": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a byte less": lambda path: os.truncate(path, path.stat().st_size - 1),
    "nothing of it": lambda path: os.truncate(path, 0),
    "a byte more": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "a bit of its first byte": lambda path: flip(path, 0),
    "a bit in the middle": lambda path: flip(path, path.stat().st_size // 2),
    "a bit of its last byte": lambda path: flip(path, -1),
    "a third of zeros": blank,
    "missing": Path.unlink,
    "a folder instead": lambda path: instead(path, Path.mkdir),
    "a pipe instead": lambda path: instead(path, os.mkfifo),
    "a link to itself": lambda path: instead(path, lambda gone: gone.symlink_to(gone.name)),
    "brackets": lambda path: path.write_text("[" * 100_000),
    "an empty map": lambda path: path.write_text("{}"),
    "a link to nothing": lambda path: instead(path, lambda gone: gone.symlink_to("/nowhere")),
}


@pytest.mark.parametrize("large", [False, True], ids=["small files", "as large files"])
@pytest.mark.parametrize("engine", ENGINES)
def test_whatever_happened_to_any_file(engine, large, folder, tmp_path, monkeypatch):
    if large:  # read by the ranks in shares
        monkeypatch.setattr(checkpoint_files, "SMALL", 0)
    shutil.copytree(folder / engine, tmp_path / "run")
    holder = tmp_path / "run" / "checkpoints"
    newest, cases = holder / "step_00000003", 0
    files = [path.relative_to(newest) for path in sorted(newest.rglob("*")) if path.is_file()]
    assert len(files) > 5 and whole_one(holder) == ("step_00000003", "")
    for file in files:
        for name, damage in EVERY_FILE.items():
            damage(newest / file)
            found, said = whole_one(holder)
            if file.name == "files.json" and name == "a byte more":  # a line's end changes no JSON
                assert found == "step_00000003"
            else:
                assert found == "step_00000002", (file, name)
                assert str(newest) in said and "\n" not in said, (file, name, said)
                assert str(file) in said or file.name == "files.json", (file, name, said)
            shutil.rmtree(newest)
            shutil.copytree(folder / engine / "checkpoints" / newest.name, newest)
            cases += 1
    assert cases > 60


def copied(folder: Path, engine: str, tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(folder / engine, tmp_path / "run")
    return tmp_path / "run", tmp_path / "run" / "checkpoints"


def rewrite(folder: Path, **facts) -> None:
    path = folder / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
    (folder / "files.json").write_text(json.dumps(describe_files(folder)))


def leave_half(folder: Path) -> None:
    """As a copy that was broken off leaves it: the listing came last."""
    (folder / "files.json").unlink()
    for path in sorted(folder.rglob("*"))[::2]:
        if path.is_file():
            path.unlink()


# What is in `checkpoints` besides steps 2 and 3: the step that is resumed from, and a part of the log's lines.
DIRECTORIES: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "latest is missing": (lambda at: (at / "latest").unlink(), 3, "latest is missing; the newest whole"),
    "latest is empty": (lambda at: (at / "latest").write_text(""), 3, "latest does not name a checkpoint"),
    "latest is no JSON": (lambda at: (at / "latest").write_bytes(b"\x00\xff"), 3, "latest does not name a checkpoint"),
    "latest is all brackets": (lambda at: (at / "latest").write_text("[" * 100_000), 3, "does not name a checkpoint"),
    "latest names none": (lambda at: (at / "latest").write_text('{"checkpoint": 3}'), 3, "does not name a checkpoint"),
    "latest names one that is gone": (
        lambda at: shutil.rmtree(at / "step_00000003"),
        2,
        "latest names step_00000003; the newest whole checkpoint is step_00000002",
    ),
    "latest names an older one": (
        lambda at: (at / "latest").write_text('{"checkpoint": "step_00000002"}'),
        3,
        "latest names step_00000002; the newest whole checkpoint is step_00000003",
    ),
    "latest leads elsewhere": (lambda at: (at / "latest").write_text('{"checkpoint": "../../x"}'), 3, "names ../../x"),
    "a newer one is empty": (lambda at: (at / "step_00000009").mkdir(), 3, "step_00000009: checkpoint.json is missing"),
    "a newer one is a file": (lambda at: (at / "step_00000009").write_text(""), 3, ""),
    "a copy under a later name": (
        lambda at: shutil.copytree(at / "step_00000003", at / "step_00000009"),
        3,
        "step_00000009: checkpoint.json is of step 3; must be of step 9, as the name says",
    ),
    "a newer one is half there": (
        lambda at: leave_half(shutil.copytree(at / "step_00000003", at / "step_00000009")),
        3,
        "step_00000009: ",
    ),
    "a newer one was being written": (
        lambda at: shutil.copytree(at / "step_00000003", at / ".step_00000009.partial"),
        3,
        "",
    ),
    "the newest was being replaced": (
        lambda at: (at / "step_00000003").rename(at / ".step_00000003.replaced"),
        3,
        "",
    ),
    "an extra file": (lambda at: (at / "step_00000003" / "x.tmp").write_text("x"), 3, "x.tmp is not of the checkpoint"),
    "an extra file beside the model's": (
        lambda at: (at / "step_00000003" / "hf" / "notes").write_text("x"),
        3,
        "hf/notes is not of the checkpoint",
    ),
    "an extra folder": (lambda at: (at / "step_00000003" / "more").mkdir(), 3, ""),
    "files of another save": (
        lambda at: (
            shutil.copytree(at / "step_00000002", at / "step_00000003", dirs_exist_ok=True)
            and shutil.copy(at.parent / "kept.json", at / "step_00000003" / "files.json")
        ),
        2,
        "step_00000003: ",
    ),
}


@pytest.mark.parametrize("name", DIRECTORIES)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_lies_beside_good_ones(engine, name, folder, tmp_path):
    run, holder = copied(folder, engine, tmp_path)
    shutil.copy(holder / "step_00000003" / "files.json", run / "kept.json")
    change, step, part = DIRECTORIES[name]
    change(holder)
    start = job_of(folder, engine, run)
    assert start.checkpoint is not None and f"step_{step:08d}" in start.checkpoint.name and start.own
    said = [line for line in start.notes if part and part in line]
    assert len(said) == (1 if part else 0) and (part or not start.notes), start.notes
    assert not start.rolled_back


# What differs in the newest checkpoint: a part of the line that refuses it.
OTHERS: dict[str, tuple[list[str], str]] = {
    "another run's data": (["data.path={folder}/other.jsonl"], "is another job's: data.path was "),
    "another seed's": (["run.seed=5"], "is another job's: run.seed was 0, is 5"),
    "another loss's": (["loss.beta=0.7"], "is another job's: loss.beta was 0.1, is 0.7"),
    "another dtype's": (["run.dtype=bf16"], "is another job's: run.dtype was 'fp32', is 'bf16'"),
    "another model's": (["model.path={folder}/narrow"], "its model has "),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_anothers_is_refused_in_a_line(engine, name, folder):
    overrides, part = OTHERS[name]
    with pytest.raises(UserError) as refused:
        job_of(folder, engine, folder / engine, *(one.format(folder=folder) for one in overrides))
    assert part in str(refused.value) and "\n" not in str(refused.value)
    if "job's" in part:  # and one key of `checkpoint.allow` overrides it
        key = overrides[0].split("=")[0]
        allowed = [*(one.format(folder=folder) for one in overrides), f"checkpoint.allow=[{key}]"]
        assert job_of(folder, engine, folder / engine, *allowed).changed == (key,)


@pytest.mark.parametrize(
    ("engine", "facts", "part"),
    [
        ("megatron", {"engine": "deepspeed"}, "was saved by engine deepspeed"),
        ("deepspeed", {"engine": "megatron"}, "was saved by engine megatron"),
        ("megatron", {"format": 2}, "format is 2; must be 1"),
        ("megatron", {"adapters": {"rank": 2, "alpha": 4, "targets": []}}, "was trained with rank 2"),
    ],
)
def test_what_no_earlier_one_can_stand_for(engine, facts, part, folder, tmp_path):
    run, holder = copied(folder, engine, tmp_path)
    rewrite(holder / "step_00000003", **facts)
    with pytest.raises(UserError, match=part):
        job_of(folder, engine, run)


def test_what_may_not_be_read(folder, tmp_path, monkeypatch):
    """A checkpoint is passed over; where the folder of all of them is it, nothing begins anew in silence."""
    run, holder = copied(folder, "megatron", tmp_path)
    closed = holder / "step_00000003"
    looked = os.stat

    def look(path, *args, **kwargs):
        if not isinstance(path, int) and closed in Path(os.fsdecode(path)).parents:
            raise PermissionError(13, "Permission denied", str(path))
        return looked(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", look)
    found = find_newest(holder)
    assert found.folder == holder / "step_00000002" and "Permission denied" in found.problems[0]
    closed = holder
    with pytest.raises(UserError, match=r"checkpoints/.* cannot be read: Permission denied"):
        find_checkpoint(run, "auto")


@pytest.mark.parametrize("engine", ENGINES)
def test_where_none_is_whole_nothing_begins_anew(engine, folder, tmp_path):
    run, holder = copied(folder, engine, tmp_path)
    for step in (2, 3):
        largest = max((holder / f"step_{step:08d}").rglob("*"), key=lambda path: path.stat().st_size)
        flip(largest, 1000)
    with pytest.raises(UserError) as refused:
        job_of(folder, engine, run)
    line = str(refused.value)
    assert "step_00000003: " in line and "the one before it is damaged too; to begin anew" in line
    assert "has checksum" in line and "\n" not in line
    fresh: Start = job_of(folder, engine, run, "checkpoint.resume=never")
    assert fresh.checkpoint is None


def test_a_named_one_is_taken_or_refused(folder, tmp_path):
    """A run's directory gives its newest whole one; a damaged checkpoint that is named itself is no good."""
    run, holder = copied(folder, "megatron", tmp_path)
    flip(holder / "step_00000003" / "metadata.json", 3)
    new = tmp_path / "new"
    for named in (run, holder, holder / "latest"):
        start = job_of(folder, "megatron", new, f"checkpoint.resume={named}")
        assert start.checkpoint == holder / "step_00000002" and not start.own
        assert any("passed over: " in line and "metadata.json has checksum" in line for line in start.notes)
    with pytest.raises(UserError, match=r"step_00000003: metadata.json has checksum"):
        job_of(folder, "megatron", new, f"checkpoint.resume={holder / 'step_00000003'}")
    largest = max((holder / "step_00000002").rglob("*"), key=lambda path: path.stat().st_size)
    flip(largest, 5)
    with pytest.raises(UserError, match="the one before it is damaged too; checkpoint.resume is "):
        job_of(folder, "megatron", new, f"checkpoint.resume={run}")


def test_large_files_are_read_by_one_rank_each(tmp_path):
    newest = write_checkpoint(tmp_path, 3)
    for number in range(5):
        shutil.copy(newest / "__0_0.distcp", newest / f"__{number}_1.distcp")
    (newest / "files.json").write_text(json.dumps(describe_files(newest)))
    assert whole_one(newest.parent) == ("step_00000003", "")
    for path in sorted(newest.glob("*.distcp")):
        flip(path, 1 << 20)
        assert find_newest(newest.parent).folder == newest  # a look alone does not read them
        said = []
        for rank in range(3):
            try:
                check_share(newest, rank=rank, num_ranks=3)
            except Damaged as error:
                said.append(str(error))
        assert len(said) == 1 and f"{path.name} has checksum" in said[0]
        flip(path, 1 << 20)


@pytest.mark.parametrize("plain", ["sizes", "maps"])
def test_other_forms_of_the_listing(plain, tmp_path):
    """Sizes alone, as earlier versions wrote them, and named numbers."""
    newest = write_checkpoint(tmp_path, 3)
    listed = describe_files(newest)
    forms = {"sizes": lambda size, crc: size, "maps": lambda size, crc: {"size": size, "crc32": crc}}
    (newest / "files.json").write_text(json.dumps({name: forms[plain](*both) for name, both in listed.items()}))
    assert whole_one(newest.parent)[0] == newest.name
    os.truncate(newest / "metadata.json", 1)
    assert whole_one(newest.parent)[0] is None


def test_a_run_goes_on_and_ends_as_if_nothing_had_happened(folder, tmp_path):
    for engine, overrides in ENGINES.items():
        run = tmp_path / engine
        shutil.copytree(folder / engine, run)
        newest = run / "checkpoints" / "step_00000003"
        largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
        flip(largest, largest.stat().st_size // 2)
        assert train(folder / "job.yaml", *overrides, f"run.dir={run}") == 0
        log = (run / "log.txt").read_text()
        assert log.count(f"passed over: {newest}: ") == 1 and "resumed from" in log and "step_00000002 after" in log
        assert numbers(metrics(run)) == numbers(metrics(folder / engine))
        assert find_newest(run / "checkpoints").notes() == []
        # What replaced the damaged one holds the very bytes that it held.
        assert largest.read_bytes() == (folder / largest.relative_to(tmp_path)).read_bytes()


def test_two_ranks_pass_over_what_either_finds(folder, tmp_path):
    """Files of more than 1 MiB, of which each rank reads its share, and a byte of each is wrong once."""
    write_model(tmp_path / "model", vocab_size=1000, hidden_size=64)
    config = write_config(
        tmp_path,
        run={"steps": 3},
        data={"path": str(folder / "data.jsonl")},
        checkpoint={"every": 1, "keep": 3},
        parallel={"tensor": 2},
    )
    command = ["train", str(config), f"run.dir={tmp_path}/run"]
    on_two_ranks(tmp_path, [(command, 0)])
    holder = tmp_path / "run" / "checkpoints"
    for step, number in ((3, 0), (2, 1)):
        large = [path for path in sorted((holder / f"step_0000000{step}").iterdir()) if path.stat().st_size > 1 << 20]
        assert len(large) == 2
        flip(large[number], 1 << 20)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    on_two_ranks(tmp_path, [(command, 0)])
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("passed over: ") == 2 and f"resumed from {holder}/step_00000001 after step 1" in log
    assert numbers(metrics(tmp_path / "run")) == numbers(metrics(tmp_path / "whole"))


def test_no_checkpoints_are_a_fresh_start(tmp_path):
    assert find_checkpoint(tmp_path, "auto") is None
    (tmp_path / "checkpoints" / ".step_00000001.partial").mkdir(parents=True)
    assert find_checkpoint(tmp_path, "auto") is None
    # But where `latest` names one, there was one: beginning anew in silence would lose the run.
    (tmp_path / "checkpoints" / "latest").write_text('{"checkpoint": "step_00000004"}')
    with pytest.raises(UserError, match=r"latest: checkpoint is 'step_00000004'; must be one that is there: none; "):
        find_checkpoint(tmp_path, "auto")
