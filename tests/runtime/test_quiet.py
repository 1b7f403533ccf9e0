"""What is printed at the start of a process: nothing that no user can act on, whichever process it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megalign.runtime import quiet
from tests.support.tiny_jobs import records, train, write_config, write_lines, write_model

ROOT = Path(__file__).resolve().parents[2]
HELPER = """
from megalign.runtime.distributed import spawn


def work():
    import megalign.engines.megatron.engine


if __name__ == "__main__":
    import megalign.models.gpt
    import megalign.train.loop

    spawn(work, 1)
    print("imported")
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A process that shows the warnings which Python shows by default."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    environment |= {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, env=environment, check=True
    )


def test_imports_are_quiet_here_and_in_processes_of_ones_own(tmp_path):
    (tmp_path / "helper.py").write_text(HELPER)
    done = run(str(tmp_path / "helper.py"))
    assert (done.stdout, done.stderr) == ("imported\n", "")


def test_the_launchers_checks_are_quiet(tmp_path):
    write_model(tmp_path / "model")
    write_lines(tmp_path / "data.jsonl", records("samples"))
    passed = {"megatron": {"bucket_size": 1000}}  # read by the checks from Megatron's own configurations
    done = run("-m", "megalign.preflight", "--ranks", "1", str(write_config(tmp_path, engine=passed)))
    assert (done.stdout, done.stderr) == ("", "")


def test_absent_packages_are_named():
    assert quiet.missing_packages({"Torch": "torch", "Nothing": "no_such_module"}) == ["Nothing"]


def test_the_log_says_once_which_layers_run(tmp_path, capfd):
    write_model(tmp_path / "model")
    write_lines(tmp_path / "data.jsonl", records("samples"))
    assert train(write_config(tmp_path, run={"steps": 1})) == 0
    absent = " and ".join(quiet.missing_packages())
    told = f"torch layers on cpu ({absent} not installed)" if absent else "torch layers on cpu;"
    assert capfd.readouterr().err.count(told) == (tmp_path / "run" / "log.txt").read_text().count(told) == 1
