"""launch/torchrun.sh exits with the job's own code, whatever a reward's module prints or does at exit."""

from __future__ import annotations

import os
import subprocess

import pytest
from tiny_jobs import ROOT, round_sections, status, write_config, write_model

from megalign import preflight

SCORE = "def score(prompt, response, record): return float(len(response) % 3)\n"
NOISE = "import atexit, os\nprint('loaded')\nos.write(1, b'raw')\natexit.register(os.write, 1, b'bye')\n"


@pytest.fixture
def launch(tmp_path):
    """Launch a job of rounds whose reward's module begins with the given lines; what became of it."""
    write_model(tmp_path / "model", tokenizer=True)
    sections = round_sections(tmp_path, rounds=1, updates_per_round=1, reward="noisy:score")
    config = write_config(tmp_path, **{"model": {"path": str(tmp_path / "model")}, **sections})

    def launch(module: str, *overrides: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
        (tmp_path / "noisy.py").write_text(module + SCORE)
        return subprocess.run(
            ["bash", str(ROOT / "launch/torchrun.sh"), str(ranks), str(config), *overrides],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        )

    return launch


def test_noise_at_import_and_at_exit_leaves_the_code_alone(launch, tmp_path):
    done = launch(NOISE + "atexit.register(os._exit, 3)\n")
    assert done.returncode == 0, done.stderr
    assert status(tmp_path / "run") == {"code": 0, "reason": "done", "step": 1}
    assert not list(tmp_path.glob("tmp.*"))


@pytest.mark.parametrize(
    ("module", "overrides", "code", "line"),
    [
        (NOISE + "atexit.register(os._exit, 3)\n", ["rollout.k=1"], 2, "megalign: error: command line: rollout.k is 1"),
        (NOISE + "os.close(1)\n", ["run.sed=1"], 2, "megalign: error: command line: run.sed is not a known key"),
        ("import os\nos._exit(0)\n", [], 1, "launch: the checks ended early, by exit code 0"),
        ("import os\nos.kill(os.getpid(), 9)\n", [], 137, "launch: the checks ended early, by signal 9"),
    ],
    ids=["refused", "unknown key", "os._exit", "killed"],
)
def test_checks_that_do_not_pass(launch, module, overrides, code, line):
    done = launch(module, *overrides)
    assert done.returncode == code and done.stdout == "", done.stderr
    assert sum(told.startswith(line) for told in done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("arguments", [[], ["2"], ["two", "job.yaml"], ["0", "job.yaml"]])
def test_launcher_says_how_it_is_used(arguments):
    done = subprocess.run(["bash", str(ROOT / "launch/torchrun.sh"), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("usage: ") and done.stderr.count("\n") == 1


def test_options_that_are_not_known_are_one_line(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert preflight.main(["--ranks", "2", "job.yaml", "--lr", "1"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err == (
        "megalign: error: command line: unrecognized arguments: --lr 1; "
        "must be: launch/torchrun.sh NPROC CONFIG.yaml [key.sub=value ...]\n"
    )
    assert not list(tmp_path.iterdir())
