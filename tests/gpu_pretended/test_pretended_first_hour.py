"""The first hour's script on a CUDA device that is not there: paths, verdicts, JSON, crashes, time limits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import first_hour
from tests.gpu.first_hour_parts import head, job, profiled, waits
from tests.gpu.first_hour_parts.report import EXPECTED, FAILED, SKIPPED, Report

ROOT = Path(__file__).resolve().parents[2]
# Three runs of the script at once, and their exit codes. What measures the device is skipped on this one.
RUNS = {
    "probes": (["--only", "probe", "tests", "crash", "wrong"], 1),
    "jobs": (["--only", "experts", "job", "head", "profile", "trl"], 0),
    "hang": (["--only", "hang", "--minutes", "0.3"], 1),
}
FAULTS = {"crash", "wrong", "hang"}
HEAD_WAYS = ("torch, recompute, default", "torch, given lse, default", "torch, given lse, 1024")
MEASURING = {"probe.memory", "probe.copies", "trl"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], str]]:
    """What the runs wrote, and what they printed."""
    folder = tmp_path_factory.mktemp("first_hour")
    command = [sys.executable, "-m", "tests.gpu_pretended.first_hour", "--small", "--out"]
    started = {
        name: subprocess.Popen(
            [*command, str(folder / f"{name}.json"), *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (arguments, _) in RUNS.items()
    }
    found = {}
    for name, process in started.items():
        out, error = process.communicate(timeout=900)
        assert process.returncode == RUNS[name][1], out[-6000:] + error[-2000:]
        found[name] = json.loads((folder / f"{name}.json").read_text()), out
    return found


def parts(runs: Any, *names: str) -> dict[str, dict[str, Any]]:
    return {part["name"]: part for name in names for part in runs[name][0]["parts"]}


def test_every_part_has_a_verdict(runs: Any) -> None:
    found = parts(runs, "probes", "jobs")
    assert [name for name in found if name not in FAULTS] == [part.name for part in first_hour.PARTS]
    for name in (part.name for part in first_hour.PARTS):
        part = found[name]
        assert part["verdict"] == (SKIPPED if name in MEASURING else EXPECTED), (name, part)
        assert all(check["verdict"] in (EXPECTED, SKIPPED) for check in part["checks"])
        assert part["reason"] if name in MEASURING else part["checks"]
    for name, text in (("head", "times"), ("profile", "times and profile")):
        skipped = [check["name"] for check in found[name]["checks"] if check["verdict"] == SKIPPED]
        assert text in skipped
    for each in ("probes", "jobs"):
        written, out = runs[each]
        assert written["machine"]["device"] == "pretended" and written["small"]
        assert all(part["name"] in out and part["expected"][:20] in out for part in written["parts"])


def test_waits_of_the_job_are_counted(runs: Any) -> None:
    """The pretended device warns as torch's sync debug mode does."""
    job = parts(runs, "jobs")["job"]
    (budget,) = (check for check in job["checks"] if check["name"].startswith("host waits"))
    assert 0 < float(budget["found"]) <= 2
    lines = [name for name in job["figures"] if name.startswith("waits a pass at")]
    assert lines and all(".py:" in name for name in lines)


def test_a_fault_of_one_part_ends_no_other(runs: Any) -> None:
    found = parts(runs, "probes", "hang")
    assert (found["crash"]["verdict"], found["crash"]["reason"]) == ("crashed", "ended by SIGSEGV")
    assert found["wrong"]["reason"] == "sum: expected 4, found 5"
    assert found["wrong"]["verdict"] == FAILED
    assert found["hang"]["verdict"] == "out of time" and found["hang"]["seconds"] < 60
    assert found["crash"]["checks"][0]["name"] == "before"  # kept
    assert all("log" in found[name] for name in FAULTS)
    status = Path(f"/proc/{found['hang']['figures'].get('child')}/stat")  # none where importing torch took the time
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "all"], "--only is 'all'; must be one of probe.products"),
        (["--minutes", "11"], "--minutes is 11; must be above 0 and at most 10"),
        (["--minutes", "nan"], "--minutes is nan; must be above 0 and at most 10"),
        (["--out", "/nowhere/a.json"], "--out is '/nowhere/a.json'; must be a file in a folder that exists"),
    ],
)
def test_bad_arguments(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        first_hour.main(arguments)
    assert words in capsys.readouterr().err


def test_without_a_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert first_hour.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_waits_above_the_budget_are_not_as_expected(tmp_path: Path) -> None:
    counted = waits.Waits()
    counted.micro_batches, counted.inside["models/a.py:1 x.cpu()"] = 10, 240
    report = Report(tmp_path / "found.json")
    job.check_waits(report, counted)
    assert report.checks[0]["verdict"] == FAILED and report.figures == {"waits a pass at models/a.py:1 x.cpu()": 24.0}


def test_nan_is_not_as_expected(tmp_path: Path) -> None:
    report = Report(tmp_path / "found.json")
    report.within("gap", float("nan"), 1.0)
    assert report.checks[0]["verdict"] == FAILED
    assert first_hour.verdict({**first_hour.read(report.path), "done": True}, 0)[0] == FAILED


def test_kernels_by_kind_and_the_idle_share() -> None:
    """10 us of a product, 2 idle, then 4 and 3 that overlap by 1: 16 busy of 18."""
    kernels = [
        ("nvjet_tst_128x256", 0.0, 10.0),
        ("void flash_fwd_splitkv", 12.0, 16.0),
        ("vectorized_elementwise_kernel", 15.0, 18.0),
    ]
    by_kind, idle = profiled.kinds_and_idle(kernels)
    assert by_kind == {"products": 0.01, "attention": 0.004, "element by element": 0.003}
    assert idle == pytest.approx(2 / 18)
    assert profiled.kinds_and_idle([]) == ({}, 0.0)


def test_times_are_held_to_their_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No device here gives times or kernels, so these are made up."""
    report = Report(tmp_path / "found.json")
    given = iter([{"ours": 30.0, "theirs": 40.0}, {"three products": 10.0, **dict.fromkeys(HEAD_WAYS, 16.0)}])
    for module in (profiled, head):
        monkeypatch.setattr(module, "take_turns", lambda ways, rounds: next(given))
    monkeypatch.setattr(profiled, "kernels_of", lambda step: [("gemm", 0.0, 1.0), ("copy", 3.0, 4.0)])
    profiled.measure(report, dict.fromkeys(("ours", "theirs"), lambda: None))
    monkeypatch.setattr(head, "clock_problem", lambda: None)
    head.time_ways(report, {})
    verdicts = {check["name"]: check["verdict"] for check in report.checks}
    assert verdicts == {
        "ours: share of the step with an idle device": FAILED,
        "our step over transformers'": EXPECTED,
        "torch, recompute, default: times three products": EXPECTED,
        "torch, given lse, default: times three products": FAILED,
    }
    assert report.figures["torch, given lse, 1024: times three products"] == 1.6
