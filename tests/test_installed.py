"""The package as `pip install .` leaves it elsewhere: a wheel in a folder of its own, called from another directory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalign import __version__
from megalign.__main__ import main
from megalign.config.job import load_config
from tests.support.tiny_jobs import ROOT, round_sections, status, write_config, write_model

REWARD = "def score(prompt, response, record): return float(len(response) % 3)\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Build a wheel of a copy of the package, and install it without its dependencies, which are here."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    shutil.copytree(ROOT / "megalign", source / "megalign", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", str(wheels), str(source)], check=True)
    subprocess.run([*pip, "install", *offline, "--target", str(target), *map(str, wheels.glob("*.whl"))], check=True)
    return target


def environment(target: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}


def call(target: Path, folder: Path, *arguments: str) -> str:
    """Return what the installed script prints when called in `folder`."""
    done = subprocess.run(
        [str(target / "bin/megalign"), *arguments],
        cwd=folder,
        env=environment(target),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_script_needs_no_repository(installed, tmp_path):
    assert call(installed, tmp_path, "--version") == f"megalign {__version__}\n"
    assert call(installed, tmp_path, "example", "gvpo") == (ROOT / "configs/gvpo.yaml").read_text()
    for command in ("train", "convert"):
        assert f"usage: megalign {command}" in call(installed, tmp_path, command, "--help")
    assert call(installed, tmp_path, "keys", "run.seed").splitlines()[1].startswith("run.seed ")
    where = [sys.executable, "-c", "import megalign; print(megalign.__file__)"]
    shown = subprocess.run(where, cwd=tmp_path, env=environment(installed), capture_output=True, text=True, check=True)
    assert shown.stdout.startswith(str(installed))


def test_launched_job_saves_when_the_launcher_is_signalled(installed, tmp_path):
    """`megalign launch` from the job's directory, whose reward is a module there; SIGINT ends it with code 75."""
    (tmp_path / "my_reward.py").write_text(REWARD)
    write_model(tmp_path / "model", tokenizer=True)
    sections = round_sections(tmp_path, rounds=100000, updates_per_round=1, reward="my_reward:score")
    write_config(tmp_path, **{"model": {"path": str(tmp_path / "model")}, **sections})
    command = [str(installed / "bin/megalign"), "launch", "1", "job.yaml"]
    job = subprocess.Popen(command, cwd=tmp_path, env=environment(installed), stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 240
    while not (tmp_path / "run/metrics.jsonl").exists() and job.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    job.send_signal(signal.SIGINT)
    _, told = job.communicate(timeout=240)
    assert job.returncode == 75, told
    assert status(tmp_path / "run")["code"] == 75
    assert list((tmp_path / "run/checkpoints").glob("step_*"))


def test_examples_are_the_configurations(capsys):
    """Each file of configs/ is an example of the package, loads, and writes nothing outside its run directory."""
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert main(["example"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == names
    for name in names:
        assert main(["example", name]) == 0
        assert capsys.readouterr().out == (ROOT / "configs" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_another_run_directory_moves_every_output(path, tmp_path):
    cfg = load_config(str(path), [f"run.dir={tmp_path}/moved"])
    assert cfg.export.hf_dir == f"{tmp_path}/moved/hf"


def test_an_unknown_example_gets_the_nearest(capsys):
    assert main(["example", "gvop"]) == 2
    assert capsys.readouterr().err.startswith("megalign: error: command line: example is 'gvop'; did you mean gvpo?; ")
