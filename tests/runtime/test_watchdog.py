"""Who is named when a job hangs, by signs of life whose times are written here, and what counts as progress."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch.distributed as dist

from megalign.runtime.heart import Heart
from megalign.runtime.job import run_job
from megalign.runtime.signs import Seen, Sign, judge, place_of, process_of, state_of, waiting_in
from megalign.runtime.status import Ending
from megalign.runtime.stop import Stop
from megalign.runtime.watchdog import Watchdog
from tests.support.tiny_jobs import write_config

MACHINE, PID, BORN = place_of()
SIGN = Sign(7, 40, "step 9", 8, "", False, "node1", MACHINE, PID, BORN)


def seen(*ranks: tuple[float, float, str]) -> dict[int, Seen]:
    """Each rank's (last sign, last progress, collective that it waits in)."""
    return {rank: Seen(replace(SIGN, waits=waits), heard, moved) for rank, (heard, moved, waits) in enumerate(ranks)}


def judged(ranks: dict[int, Seen], size: int | None = None, **options: bool):
    return judge(ranks, size or len(ranks), now=100.0, timeout_s=10.0, here=MACHINE, **options)


def test_ranks_that_wait_for_one_that_makes_progress_are_left_alone():
    assert judged(seen((99, 50, "all_reduce"), (99, 91, ""))) is None
    assert judged(seen((91, 91, "all_reduce"), (90, 50, ""))) is None  # silent for just ten seconds


def test_a_silent_rank_is_named_whatever_the_others_do():
    verdict = judged(seen((99, 99, ""), (99, 50, "all_reduce"), (89, 89, ""), (80, 80, "")))
    assert verdict is not None and verdict.ranks == (2, 3) and verdict.silent and verdict.step == 8
    assert verdict.reason.startswith("ranks 2-3 of 4 gave no sign of life for 10 s (watchdog.timeout_s), the last in ")
    assert verdict.reason.endswith("; ranks 0-1 of 4 in step 9")


def test_the_step_is_the_newest_that_any_rank_knows():
    ranks = seen((99, 99, ""), (80, 80, ""))
    ranks[0].sign = replace(ranks[0].sign, step=12)
    verdict = judged(ranks)
    assert verdict is not None and verdict.step == 12


def test_without_progress_the_rank_outside_a_collective_is_named():
    verdict = judged(seen((99, 80, "all_reduce of _step"), (99, 81, ""), (99, 79, "all_reduce of _step")))
    assert verdict is not None and verdict.ranks == (1,) and not verdict.silent
    assert verdict.reason == (
        "rank 1 of 3 made no progress for 10 s (watchdog.timeout_s) in step 9; ranks 0, 2 of 3 in step 9, waiting in "
        "all_reduce of _step"
    )


def test_where_all_wait_the_collective_of_the_fewest_is_named():
    verdict = judged(seen((99, 80, "all_reduce"), (99, 80, "barrier"), (99, 80, "all_reduce")))
    assert verdict is not None and verdict.ranks == (1,)
    assert verdict.reason.endswith("in step 9, waiting in barrier; ranks 0, 2 of 3 in step 9, waiting in all_reduce")


def test_ranks_that_have_ended_by_themselves_count_no_more():
    ranks = seen((99, 80, ""), (10, 10, ""))
    ranks[1].sign = replace(ranks[1].sign, left=True)
    verdict = judged(ranks)
    assert verdict is not None and verdict.ranks == (0,)
    assert judged(seen((99, 99, ""), (10, 10, ""))) is not None
    ranks[0].moved = 99
    assert judged(ranks) is None


def test_one_that_stopped_after_the_last_progress_is_waited_for_until_it_is_silent():
    assert judged(seen((99, 80, "all_reduce"), (90, 88, ""))) is None
    verdict = judged(seen((99, 80, "all_reduce"), (96, 88, "")))
    assert verdict is not None and verdict.ranks == (1,) and not verdict.silent


def test_one_that_sees_a_part_of_the_ranks_judges_only_silence():
    assert judged(seen((99, 10, "")), size=4, stalls=False) is None
    assert judged(seen((89, 10, "")), size=4, stalls=False) is not None


def test_a_sign_is_new_by_its_tick_and_progress_by_its_count_or_phase():
    each = Seen(SIGN, 1.0, 1.0)
    each.hear(SIGN, 2.0)
    assert (each.heard, each.moved) == (1.0, 1.0)
    each.hear(replace(SIGN, tick=8), 3.0)
    assert (each.heard, each.moved) == (3.0, 1.0)
    each.hear(replace(SIGN, tick=9, phase="saving step 9"), 4.0)
    assert (each.heard, each.moved) == (4.0, 4.0)
    assert Sign.unpack(SIGN.pack().encode()) == SIGN


def test_what_the_system_says_of_a_process():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        sign = replace(SIGN, pid=process.pid, born=psutil.Process(process.pid).create_time())
        assert "runs, but something in it holds" in state_of(sign, MACHINE)
        assert "is stopped, gone, cut off" in state_of(sign, "another machine")
        psutil.Process(process.pid).suspend()
        until = time.monotonic() + 10
        while "is stopped (SIGSTOP" not in state_of(sign, MACHINE) and time.monotonic() < until:
            time.sleep(0.01)
        assert "is stopped (SIGSTOP" in state_of(sign, MACHINE)
        assert process_of(replace(sign, born=sign.born - 60)) is None  # another process with the number of an ended one
    finally:
        process.kill()
    until = time.monotonic() + 10
    while "has ended without a word" not in state_of(sign, MACHINE) and time.monotonic() < until:
        time.sleep(0.01)  # a zombie: nobody has asked for its code
    assert "has ended without a word" in state_of(sign, MACHINE)
    process.wait()
    assert "has ended without a word" in state_of(sign, MACHINE)


def compute() -> None:
    """Use a second and a half of the processor, in another thread than the one that looks."""
    until = time.process_time() + 1.5

    def spin() -> None:
        while time.process_time() < until:
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    thread.join()


def test_bytes_and_processor_time_are_progress_only_where_a_phase_says_so(tmp_path):
    heart = Heart()

    def moves(work) -> bool:
        heart.progress()
        before = heart.progress()
        work()
        return heart.progress() > before

    def write() -> None:
        with open(tmp_path / "data", "wb", buffering=0) as file:
            for _ in range(3):
                file.write(bytes(2**20))

    def write_in_a_child() -> None:
        child = subprocess.Popen(
            [sys.executable, "-c", f"open({str(tmp_path / 'data')!r}, 'wb').write(bytes(4 * 2**20)); input()"],
            stderr=subprocess.DEVNULL,
            stdin=subprocess.PIPE,
        )
        until = time.monotonic() + 20
        while not (Path(tmp_path / "data").exists() and os.path.getsize(tmp_path / "data") == 4 * 2**20):
            assert time.monotonic() < until
        held.append(child)

    held: list[subprocess.Popen[bytes]] = []
    assert moves(heart.beat) and not moves(write)
    with heart.during("saving", 3, counts="bytes"):
        assert (heart.phase, heart.step) == ("saving", 3)
        assert moves(write) and not moves(compute) and not moves(lambda: time.sleep(0.2))
        (tmp_path / "data").unlink()
        assert moves(write_in_a_child)
        held[0].communicate()
    with heart.during("reading", counts="work"):
        assert moves(compute)
    with heart.during("saving", 3, counts="bytes"):
        assert not moves(lambda: [heart.progress() for _ in range(1000)])  # which reads more than 1 MiB below /proc
    looked = heart._activity.moved
    for _ in range(100):
        heart._activity.look()
    assert heart._activity.moved - looked < 100 * 100  # a page more or less is no look
    assert (heart.phase, heart.step) == ("starting", None)


def test_importing_the_program_is_progress(tmp_path, monkeypatch):
    """On a slow file system it takes longer than a short time-out."""
    held = Ending()
    monkeypatch.setattr("megalign.runtime.job.Ending", lambda *_, **__: held)

    found: list[bool] = []

    def load():
        held.heart.progress()
        before = held.heart.progress()
        compute()
        found.append(held.heart.progress() > before)
        return lambda *_: 0

    args = argparse.Namespace(config=str(write_config(tmp_path)), overrides=[])
    assert run_job(args, None, load, Stop()) == 0 and found == [True]


def test_a_frame_between_two_lines_is_no_collective(monkeypatch):
    code = SimpleNamespace(co_filename=__file__, co_name="running")
    frame = SimpleNamespace(f_code=code, f_lineno=None, f_back=None)
    monkeypatch.setattr(sys, "_current_frames", lambda: {1: frame})
    assert waiting_in() == ""


def test_signs_go_on_where_what_they_say_cannot_be_found(monkeypatch):
    """Without them others would end a rank that is well."""

    def fail():
        raise ValueError("no such number")

    heart, store = Heart(), dist.HashStore()
    heart.beat()
    watchdog = Watchdog(heart, rank=0, size=1, timeout_s=2.0)
    watchdog.start(store)
    monkeypatch.setattr(heart, "progress", fail)
    monkeypatch.setattr("megalign.runtime.watchdog.waiting_in", fail)
    before, until = watchdog.seen[0].sign, time.monotonic() + 10
    while watchdog.seen[0].sign.tick < before.tick + 3 and time.monotonic() < until:
        time.sleep(0.05)
    assert watchdog.seen[0].sign.tick >= before.tick + 3
    assert watchdog.seen[0].sign.progress == before.progress == 1
    watchdog.close()


def test_a_watchdog_leaves_nothing_behind(tmp_path):
    heart = Heart()
    watchdog = Watchdog(heart, rank=0, size=1, timeout_s=5.0)
    watchdog.start(dist.HashStore())
    watchdog.report_in(tmp_path)
    assert (tmp_path / "watchdog" / "rank_0.txt").exists()
    for _ in range(4):
        heart.beat()
        time.sleep(0.1)
    watchdog.close()
    assert not (tmp_path / "watchdog").exists()


def test_a_frame_between_lines_has_no_number(monkeypatch):
    """It ends no watchdog's thread."""
    frame = SimpleNamespace(f_code=waiting_in.__code__)
    monkeypatch.setattr(sys, "_current_frames", lambda: {1: frame})
    monkeypatch.setattr(traceback, "walk_stack", lambda held: iter([(held, None)]))
    assert waiting_in() == ""
