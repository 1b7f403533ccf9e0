"""What the doctor does to a directory, and what it leaves there: nothing."""

from __future__ import annotations

import os
import time

import pytest

from megalign.config.job import load_config
from megalign.convert.hf.model import read_model
from megalign.doctor import disk
from megalign.doctor.needed import Written, gigabytes, written
from tests.support import mounts
from tests.support.tiny_jobs import write_config, write_model


def test_a_probe_leaves_nothing(tmp_path):
    assert disk.write_speed(tmp_path / "speed") > 1e5
    assert disk.reserve(tmp_path / "reserved", 1 << 20) == ""
    assert list(tmp_path.iterdir()) == []
    assert disk.lacking(tmp_path) == {}


def test_old_probes_are_swept_and_young_ones_stay(tmp_path):
    old, young, own, others = (
        tmp_path / name for name in (f"{disk.PREFIX}a", f"{disk.PREFIX}b", f"{disk.PREFIX}c", "d")
    )
    for folder in (old, young, own, others):
        folder.mkdir()
        (folder / "0").write_text("")
    before = time.time() - disk.FORGOTTEN_S - 10
    for folder in (old, others):
        os.utime(folder, (before, before))
    disk.sweep(tmp_path, own)
    assert sorted(tmp_path.iterdir()) == sorted([young, own, others])


def test_locks_are_seen_by_others(tmp_path):
    first, problem = disk.hold_lock(tmp_path)
    second, refused = disk.hold_lock(tmp_path)
    os.close(first)
    os.close(second)
    assert problem == "" and refused == "held"


def test_awaited_file(tmp_path):
    (tmp_path / "file").write_text("content")
    now = time.monotonic()
    assert disk.awaited(tmp_path / "file", "content", now) == ""
    assert disk.awaited(tmp_path / "file", "other", now) == "another file is there"
    assert disk.awaited(tmp_path / "none", "content", now + 0.3) == "No such file or directory"
    assert time.monotonic() - now < 5


@pytest.mark.skipif(bool(mounts.missing()), reason=mounts.missing() or "file systems can be mounted")
def test_file_system_and_space(tmp_path):
    with mounts.mounted(tmp_path / "a b", "size=64k,nr_inodes=9") as folder:
        assert disk.file_system(folder / "none")[0] == "tmpfs"
        free, files = disk.space(folder)
        assert free == 65536 and files == 8
        with pytest.raises(OSError, match="No space left"):
            disk.write_speed(folder / "speed")
        assert disk.reserve(folder / "reserved", 1 << 20) == "No space left on device"
        assert list(folder.iterdir()) == []
    assert disk.file_system(tmp_path) == disk.file_system(tmp_path / "a b")


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        ([], 1),  # after the last of three steps
        (["checkpoint.every=1"], 3),  # two are kept while the third is written
        (["checkpoint.every=1", "run.steps=1"], 2),
        (["checkpoint.every=10", "run.steps=null", "run.epochs=2"], 3),
        (["checkpoint.every=10", "run.steps=100", "checkpoint.keep=1", "checkpoint.keep_every=50"], 4),
    ],
)
def test_checkpoints_at_one_time(tmp_path, overrides, count):
    model = read_model(write_model(tmp_path / "model"))
    needs = written(load_config(str(write_config(tmp_path)), overrides), model)
    assert (needs.num_checkpoints, needs.export) == (count, 0)
    (tmp_path / "run/checkpoints/step_00000001").mkdir(parents=True)
    again = written(load_config(str(write_config(tmp_path)), overrides), model)
    assert again.num_checkpoints == count - 1  # one is there already


def test_sizes_in_words():
    assert [gigabytes(size) for size in (1.5e12, 141e9, 16.06e9, 2e6, 400)] == [
        "1.5 TB",
        "141 GB",
        "16.1 GB",
        "2 MB",
        "0.4 kB",
    ]
    assert Written(16_060_000_000, 3, 0).in_words == "3 checkpoints of 16.1 GB"
