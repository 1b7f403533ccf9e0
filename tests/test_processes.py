"""Children that have their imports done behave as fresh processes do: environment, output, exit code, failure."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from tests.support.processes import on_two_ranks, run_python, run_ranks

SCRIPT = """
import os, sys
print(os.environ["GIVEN"], os.environ.get("RANK"), *sys.argv[1:])
print(__name__, file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


def fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError(f"rank 1 of {os.environ['WORLD_SIZE']}, {os.environ['GIVEN']}")


def test_a_script_has_its_arguments_environment_and_exit_code(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    for code in (0, 3):
        done = run_python(tmp_path, tmp_path / "script.py", str(code), environment={"GIVEN": "here"})
        assert (done.returncode, done.stdout, done.stderr) == (code, f"here None {code}\n", "__main__\n")
    (tmp_path / "script.py").write_text("raise ValueError('no')")
    done = run_python(tmp_path, tmp_path / "script.py")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "ValueError: no"


def test_a_module_runs_as_main(tmp_path):
    done = run_python(tmp_path, "-m", "json.tool", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: ")


def test_a_rank_that_fails_is_raised_here(monkeypatch):
    monkeypatch.setenv("GIVEN", "set since")
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="rank 1 of 2, set since"):
        run_ranks(fail_on_rank_1, 2)


def test_a_wrong_exit_code_of_a_job_is_told(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="exit code 2 instead of 0"):
        on_two_ranks(tmp_path, [(["train", str(tmp_path / "absent.yaml")], 0)])


def test_children_have_nothing_of_this_process(tmp_path):
    sys.modules["json"].__dict__["left_here"] = True
    try:
        (tmp_path / "script.py").write_text("import json; print(hasattr(json, 'left_here'))")
        assert run_python(tmp_path, tmp_path / "script.py").stdout == "False\n"
    finally:
        del sys.modules["json"].__dict__["left_here"]
