"""What ranks saw of a directory is judged: what this machine's file systems do not do is given as values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megalign.config.job import load_config
from megalign.doctor.storage_findings import judge_place
from tests.support.tiny_jobs import write_config, write_model

HOSTS = ["a", "a", "b"]
ROOM = {"free": 10e9, "files": None, "needed": 3e9, "needed files": 20, "what": "3 checkpoints", "checkpoint": 1e9}
MAIN = {"field": "run.dir", "base": "/runs", "unseen": "", "unwritable": "", "not back": {}, "lock": "", "lacking": {}}
MAIN |= {"kind": ["nfs4", "server:/x"], "alone": 1e8, "at once": 1e8, "slow": "", "room": ROOM}
OTHER = {"base": "/runs", "unseen": "", "unwritable": "", "at once": 1e8}


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_model(folder / "model")
    return load_config(str(write_config(folder)))


@pytest.mark.parametrize(
    ("main", "last", "check", "state", "words"),
    [
        ({}, {"second lock": "held"}, "file system", "ok", "nfs4 (server:/x): rename, sync and locks work"),
        ({}, {"second lock": ""}, "file system", "warn", "but not between rank 0 and rank 2 on b"),
        ({"lock": "Function not implemented"}, {}, "file system", "fail", "no locks: Function not implemented"),
        ({"lacking": {"hard links": "no"}}, {}, "file system", "ok", "hard links do not"),
        ({"lacking": {"rename": "no"}}, {}, "file system", "fail", "no rename: no"),
        ({"kind": ["overlay", "overlay"]}, {}, "file system", "warn", "overlay: rename, sync and locks work; it is a"),
        ({"not back": {"2": "stale"}}, {}, "shared", "fail", "rank 0 does not see what rank 2 on b writes: stale"),
        ({}, {"unwritable": "Permission denied"}, "writable", "fail", "Permission denied (rank 2 on b)"),
        ({}, {}, "speed", "ok", "by 3 at once; a checkpoint of 1 GB takes about 10.0 s"),
        ({"alone": 1e6}, {}, "speed", "warn", "a checkpoint of 1 GB takes about 1000.0 s"),
        ({}, {}, "space", "ok", "3 GB for 3 checkpoints; 10 GB are free in /runs"),
        ({"room": {**ROOM, "free": 5e9}}, {}, "space", "warn", "5 GB are free"),
        ({"room": {**ROOM, "free": 2e9}}, {}, "space", "fail", "2 GB are free"),
        ({"room": {**ROOM, "files": 10}}, {}, "space", "fail", "10 files (inodes) are free"),
        (
            {"room": {**ROOM, "quota": "Disk quota exceeded"}},
            {},
            "space",
            "fail",
            "not to this user: Disk quota exceeded",
        ),
        ({"room": {"free": 1e9, "files": None}}, {}, "space", "warn", "without the model"),
    ],
)
def test_findings(cfg, main, last, check, state, words):
    visit: Any = SimpleNamespace(hosts=HOSTS, world=SimpleNamespace(size=3))
    findings = judge_place(visit, cfg, [{**MAIN, **main}, OTHER, {**OTHER, **last}])
    (found,) = [finding for finding in findings if finding.check == f"run.dir {check}"]
    assert found.state == state and words in found.found, found
    assert state == "ok" or found.advice or "without the model" in words
    others = {finding.state for finding in findings if finding is not found}
    assert others == {"ok"}
