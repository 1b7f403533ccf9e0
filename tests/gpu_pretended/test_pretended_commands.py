"""Whole jobs on a CUDA device that is not there: the numbers are those of the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.tiny_jobs import (
    NOW,
    metrics,
    numbers,
    records,
    round_sections,
    train,
    write_config,
    write_lines,
    write_model,
)

ROOT = Path(__file__).resolve().parents[2]
SFT: dict[str, Any] = {"loss": {"name": "sft"}, "checkpoint": {"every": 2}}
LORA = {"lora": {"rank": 2, "alpha": 4.0}, "engine": {"recompute": "full"}}


def write_jobs(folder: Path) -> dict[str, tuple[Path, list[list[str]]]]:
    """Configurations and the overrides of each run, by name."""
    jobs: dict[str, tuple[Path, list[list[str]]]] = {}
    for name in ("sft", "resumed", "lora", "rounds", "deterministic rounds"):
        place = folder / name
        write_model(place / "model", tokenizer="rounds" in name)
        kind = "samples" if "rounds" in name else "singles"
        write_lines(place / "data.jsonl", records(kind))
        export = {"export": {"hf_dir": str(place / "run" / "exported")}}
        sections: dict[str, Any] = {**SFT, **export}
        if name == "lora":
            sections = {**sections, **LORA}
        if "rounds" in name:
            sections = round_sections(place) | export
            sections["run"] = {"steps": None, "deterministic": name.startswith("deterministic")}
        runs = [[NOW], []] if name == "resumed" else [[]]
        jobs[name] = write_config(place, **sections), runs
    return jobs


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[int], list[int], Path, Path]]:
    """Exit codes here and on the device, and run directories here and on the device."""
    folder = tmp_path_factory.mktemp("jobs")
    here = write_jobs(folder / "here")
    there = write_jobs(folder / "there")
    lines = [["train", str(config), *run] for config, runs in there.values() for run in runs]
    (folder / "commands.json").write_text(json.dumps(lines))
    command = [sys.executable, "-m", "tests.gpu_pretended.commands", str(folder / "commands.json")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-4000:]
    codes = iter(json.loads(run.stdout.splitlines()[-1]))
    try:
        return {
            name: (
                [train(config, *overrides) for overrides in runs],
                [next(codes) for _ in runs],
                config.parent / "run",
                there[name][0].parent / "run",
            )
            for name, (config, runs) in here.items()
        }
    finally:
        torch.use_deterministic_algorithms(False)  # a job leaves it to its process


@pytest.mark.parametrize("name", ["sft", "resumed", "lora", "rounds", "deterministic rounds"])
def test_a_job_has_the_numbers_of_the_cpu(jobs: Any, name: str) -> None:
    codes, on_device, here, there = jobs[name]
    assert on_device == codes and codes[-1] == 0
    for right, found in zip(numbers(metrics(here)), numbers(metrics(there)), strict=True):
        assert found.keys() == right.keys()
        # A step's log-probs agree to 1e-6 of sums near 20; correlations divide their differences by their spread.
        for key, value in right.items():
            words = value is None or isinstance(value, str)
            assert found[key] == (value if words else pytest.approx(value, rel=2e-4, abs=2e-5, nan_ok=True)), key
    exported = list((here / "exported").glob("*.safetensors"))
    assert exported
    for file in exported:
        right, found = load_file(file), load_file(there / "exported" / file.name)
        assert right.keys() == found.keys()
        assert all(found[key].allclose(right[key], rtol=1e-3, atol=1e-5) for key in right)
