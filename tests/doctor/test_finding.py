"""Ranks in words, and the report's three forms."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress

from megalign.doctor.finding import Finding, listed, where
from megalign.doctor.report import lines, passed, show
from megalign.runtime.ranks import span


def test_ranks_in_words():
    assert span([3]) == "rank 3"
    assert span([6, 0, 2, 1, 3]) == "ranks 0-3, 6"
    hosts = ["a", "a", "b", "b"]
    assert where([2], hosts) == "rank 2 on b"
    assert where([1, 3], hosts) == "rank 1 on a, rank 3 on b"
    assert where([0, 1, 2, 3], hosts) == "all 4 ranks"
    assert where([0], ["a"]) == "rank 0 on a"
    many = [f"h{i}" for i in range(9)]
    assert where(range(8), many).endswith("rank 5 on h5 and 2 more hosts")
    assert listed(["1", "1", "2", "1"], hosts) == "1 (ranks 0-1 on a, rank 3 on b); 2 (rank 2 on b)"


def test_report(capsys):
    findings = [Finding("clocks", "ok", "fine"), Finding("limits", "fail", "too low", "raise it")]
    job = {"ranks": 1, "hosts": 1, "config": None, "seconds": 2.4}
    assert list(lines(findings, job)) == [
        "ok    clocks  fine",
        "fail  limits  too low",
        "              -> raise it",
        "doctor: 1 ok, 0 warn, 1 fail (1 rank, 1 host, 2 s)",
    ]
    assert not passed(findings) and passed(findings[:1])
    show(findings, job, as_json=True)
    held = json.loads(capsys.readouterr().out)
    assert held["ok"] is False and held["job"] == job
    assert held["findings"][1] == {"check": "limits", "state": "fail", "found": "too low", "advice": "raise it"}


def read_to_end(terminal: int) -> str:
    """All that was written to a terminal whose other end is closed; one read may return a part of it."""
    text = b""
    with suppress(OSError):  # which is how a terminal ends
        while part := os.read(terminal, 10000):
            text += part
    os.close(terminal)
    return text.decode()


def test_table_on_a_terminal(monkeypatch):
    terminal, end = os.openpty()
    monkeypatch.setenv("COLUMNS", "100")
    with open(end, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        show(
            [Finding("limits", "fail", "too [low]", "raise it")], {"ranks": 1, "hosts": 1, "seconds": 2}, as_json=False
        )
    text = read_to_end(terminal)
    assert all(word in text for word in ("what to do", "fail", "limits", "too [low]", "raise it"))
    assert "doctor: 0 ok, 0 warn, 1 fail (1 rank, 1 host, 2 s)" in text
