"""How a job ends where only files and exit codes are seen."""

from __future__ import annotations

import json

import pytest

from megalign.runtime.status import BAD_INPUT, STOPPED, guarded, write_status
from megalign.schema import UserError


def refuse() -> int:
    raise UserError("data.path:\n  no such file")


def test_status_is_replaced_whole(tmp_path):
    folder = tmp_path / "new" / "run"
    write_status(folder, 0, "done", 7)
    write_status(folder, STOPPED, "SIGTERM", 9)
    assert json.loads((folder / "status.json").read_text()) == {"code": 75, "reason": "SIGTERM", "step": 9}
    assert [path.name for path in folder.iterdir()] == ["status.json"]


def test_bad_input_is_one_line_a_code_and_a_status(tmp_path, capsys):
    assert guarded(refuse, lambda: str(tmp_path)) == BAD_INPUT == 2
    assert capsys.readouterr() == ("", "megalign: error: data.path: no such file\n")
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "code": 2,
        "reason": "data.path: no such file",
        "step": None,
    }


def test_bad_input_without_a_known_directory_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert guarded(refuse) == 2
    assert not list(tmp_path.iterdir())


def test_status_that_cannot_be_written_keeps_line_and_code(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert guarded(refuse, lambda: str(blocked / "run")) == 2
    assert capsys.readouterr().err == "megalign: error: data.path: no such file\n"


def test_bugs_are_not_taken_for_bad_input(tmp_path):
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0, lambda: str(tmp_path))
    assert not list(tmp_path.iterdir())
