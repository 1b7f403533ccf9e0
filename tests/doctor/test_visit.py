"""Ranks stay in step when a check fails on some of them, and nobody waits for ever for one that is silent."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from megalign.doctor.finding import Finding
from megalign.doctor.visit import Check, NoAnswer, Visit, run_checks
from megalign.runtime.distributed import World


def on_ranks(num_ranks, work, **options):
    """Run `work(visit)` for each rank in a thread; return the visits and what was raised."""
    store, raised = dist.HashStore(), [None] * num_ranks
    visits = [Visit(World(rank, num_ranks, torch.device("cpu")), store, **options) for rank in range(num_ranks)]

    def run(rank):
        try:
            work(visits[rank])
        except Exception as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return visits, raised


def judge(visit, answers):
    return [Finding("sums", "ok", str(answers))]


def read(visit):
    return sum(visit.share("ones", 1)) + sum(visit.share("twos", 2))


def test_values_of_all_ranks():
    visits, raised = on_ranks(3, lambda visit: run_checks(visit, [Check("sums", read, judge)]))
    assert raised == [None] * 3
    assert visits[0].findings == [Finding("sums", "ok", "[9, 9, 9]")] and visits[1].findings == []


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_a_check_that_fails_on_one_rank_fails_on_all_in_step(failing, when):
    def broken(visit):
        for place in ("before", "between", "after"):
            if when == place and visit.world.rank == failing:
                raise ValueError("no such thing")
            if place != "after":
                visit.share(place, 1)

    def work(visit):
        visit.hosts = ["a", "b", "c"]
        run_checks(visit, [Check("broken", broken, judge), Check("sums", read, judge)])

    visits, raised = on_ranks(3, work, patience_s=5.0)
    assert raised == [None] * 3
    found = f"could not be checked on rank {failing} on {'abc'[failing]}: ValueError: no such thing"
    first, second = visits[0].findings
    assert first == Finding("broken", "fail", found, "correct this first")
    assert second == Finding("sums", "ok", "[9, 9, 9]")
    assert len({visit.calls for visit in visits}) == 1


def test_a_judge_that_fails_is_a_finding():
    visits, _ = on_ranks(2, lambda visit: run_checks(visit, [Check("odd", lambda visit: None, lambda *_: 1 // 0)]))
    (finding,) = visits[0].findings
    assert finding.state == "fail" and "could not be judged: ZeroDivisionError" in finding.found


def test_a_silent_rank_is_named_on_all_others_and_findings_stay():
    def work(visit):
        visit.meet()
        visit.hosts = ["a", "b", "c"]
        run_checks(visit, [Check("sums", read, judge)])
        if visit.world.rank == 2:
            time.sleep(2.5)
        run_checks(visit, [Check("late", lambda visit: visit.world.rank, judge)])

    visits, raised = on_ranks(3, work, patience_s=0.5)
    for rank in (0, 1):
        assert isinstance(raised[rank], NoAnswer)
        assert str(raised[rank]) == "check late: rank 0 waited 0.5 s for rank 2 on c"
    assert [finding.check for finding in visits[0].findings] == ["sums"]
