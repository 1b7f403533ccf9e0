"""A run that is stopped while it scores goes on with what was scored; a resumed one scores nothing anew."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megalign.scores.store
from megalign.engines.scoring import score
from tests.support.tiny_jobs import (
    NOW,
    metrics,
    numbers,
    records,
    train,
    write_config,
    write_lines,
    write_model,
    write_tokenizer,
)

JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "sums under the initial policy": ("samples", {}),
    "tokens under another reference": (
        "samples",
        {"loss": {"name": "grpo", "beta": 0.1}, "reference": "other"},
    ),
    "a teacher": ("singles", {"loss": {"name": "poft"}, "teachers": "other"}),
}


@pytest.fixture(scope="module", params=JOBS)
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Callable[..., int], Path]:
    """A job of five steps whose run directory the call names."""
    kind, changes = JOBS[request.param]
    folder = tmp_path_factory.mktemp("kept")
    for seed, name in enumerate(("model", "other")):
        write_tokenizer(write_model(folder / name, seed=seed))
    lines = records(kind, 24)
    if "teachers" in changes:
        lines = [{"prompt": f"{number}+1=", "completion": f"{number + 1}"} for number in range(300)]
        changes = {**changes, "teachers": [{"name": "t", "path": str(folder / "other")}]}
    if "reference" in changes:
        changes = {**changes, "reference": {"source": str(folder / "other")}}
    write_lines(folder / "data.jsonl", lines)
    config = write_config(
        folder, **{"run": {"steps": 6}, "data": {"groups_per_step": 4}, "checkpoint": {"every": 2}, **changes}
    )
    return lambda name, *more: train(config, f"run.dir={folder / name}", *more), folder


def count_scorings(monkeypatch: pytest.MonkeyPatch, *, stop_after: int | None = None) -> list[int]:
    """Note the number of sequences of each scoring before the first step; send SIGTERM with one of them."""
    calls: list[int] = []

    def counted(engine: Any, sequences: Any, **options: Any) -> Any:
        calls.append(len(sequences))
        if len(calls) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(engine, sequences, **options)

    monkeypatch.setattr(megalign.scores.store, "score", counted)
    return calls


def test_what_was_scored_before_a_stop_is_kept(job, monkeypatch):
    run, folder = job
    calls = count_scorings(monkeypatch)
    assert run("undisturbed") == 0
    whole = list(calls)
    assert len(whole) > 1
    calls = count_scorings(monkeypatch, stop_after=1)
    assert run("stopped") == 75
    assert calls == whole[:1]
    calls = count_scorings(monkeypatch)
    assert run("stopped") == 0
    assert calls == whole[1:]
    assert numbers(metrics(folder / "stopped")) == numbers(metrics(folder / "undisturbed"))
    assert "sequences have their scores in" in (folder / "stopped" / "log.txt").read_text()


def test_a_resumed_run_scores_nothing_anew(job, monkeypatch):
    run, folder = job
    assert run("resumed", NOW) == 75
    calls = count_scorings(monkeypatch)
    assert run("resumed") == 0
    assert not calls
    assert [line["step"] for line in metrics(folder / "resumed")] == [1, 2, 3, 4, 5, 6]


def test_scores_of_other_weights_or_damaged_files_are_not_read(job, monkeypatch):
    run, folder = job
    assert run("other") == 0
    files = sorted((folder / "other" / "scores").iterdir())
    assert files
    for number, file in enumerate(files):
        file.write_bytes(file.read_bytes()[: 40 * number])
    for name in ("metrics.jsonl", "checkpoints", "steps"):
        path = folder / "other" / name
        if path.exists():
            path.rename(folder / f"{name} of before")
    calls = count_scorings(monkeypatch)
    assert run("other") == 0
    assert sum(calls) > 0
    assert numbers(metrics(folder / "other")) == numbers(metrics(folder / "undisturbed"))
