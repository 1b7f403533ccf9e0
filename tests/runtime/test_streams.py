"""A job outlives the reader of its console, and never takes that for a good end."""

from __future__ import annotations

import os
import sys

import pytest

from megalign.runtime.exit_codes import DONE
from megalign.runtime.status import guarded
from megalign.runtime.streams import lasting
from megalign.schema import UserError
from tests.support.tiny_jobs import metrics, records, status, train, write_config, write_lines, write_model


@pytest.fixture
def nobody_reads(monkeypatch):
    """Standard streams whose reader has gone."""
    reads, writes = os.pipe()
    os.close(reads)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, os.fdopen(os.dup(writes), "w", buffering=1))
    os.close(writes)
    with pytest.raises(BrokenPipeError):
        print("somebody?", file=sys.stderr, flush=True)


def test_a_job_goes_on_without_its_console(tmp_path, nobody_reads):
    write_model(tmp_path / "model")
    write_lines(tmp_path / "data.jsonl", records("samples"))
    assert train(write_config(tmp_path, run={"steps": 2})) == 0
    assert status(tmp_path / "run")["code"] == 0 and len(metrics(tmp_path / "run")) == 2
    assert train(write_config(tmp_path, run={"steps": -1})) == 2


def test_a_refusal_that_nobody_reads_has_its_code_and_status(tmp_path, nobody_reads):
    def refuse() -> int:
        raise UserError("data.path: no such file")

    assert guarded(refuse, lambda: str(tmp_path)) == 2
    assert status(tmp_path)["reason"] == "data.path: no such file"


def test_a_pipe_that_breaks_ends_only_a_tool_well():
    def write() -> int:
        raise BrokenPipeError

    assert guarded(write) == DONE
    with lasting("stdout"), pytest.raises(BrokenPipeError):
        guarded(write)


def test_streams_are_the_same_again_afterwards(capsys):
    before = sys.stderr
    with lasting("stderr"):
        print("told", file=sys.stderr)
        assert sys.stderr.isatty() is before.isatty() and sys.stderr is not before
    assert sys.stderr is before and capsys.readouterr().err == "told\n"
