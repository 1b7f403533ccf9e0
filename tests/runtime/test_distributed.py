"""Start-up of a job's processes, and what becomes of their failures."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalign.runtime.distributed import launched, process_group, spawn


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
