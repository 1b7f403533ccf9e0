"""Training's own checks run in the doctor for a limited time, and their refusal is the doctor's."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from megalign.config.job import load_config
from megalign.doctor import refusals
from megalign.doctor.finding import Finding
from tests.support.tiny_jobs import records, write_config, write_lines, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_model(folder / "model")
    return folder


def findings(folder, *overrides: str, ranks: int = 1) -> list[Finding]:
    cfg = load_config(str(write_config(folder)), overrides)
    visit: Any = SimpleNamespace(cfg=cfg, world=SimpleNamespace(size=ranks, is_main=True))
    (check,) = refusals.refusal_checks()
    return check.judge(visit, [check.read(visit)])


def test_a_bad_record_is_refused_in_training_s_words(folder):
    lines = records("samples")
    lines[3]["responses"][0]["reward"] = "much"
    write_lines(folder / "data.jsonl", lines)
    (found,) = findings(folder)
    assert found.state == "fail" and f"{folder}/data.jsonl:4: " in found.found and "reward" in found.found


def test_micro_batches_of_the_first_step_fill_the_stages(folder):
    write_lines(folder / "data.jsonl", records("samples"))
    read, stages = findings(folder, "parallel.pipeline=2", ranks=2)
    assert read.state == "ok" and read.found.startswith("8 records, ")
    assert stages.check == "pipeline" and "micro-batches a step through 2 stages" in stages.found


def test_a_layout_s_refusal_is_told_once(folder):
    assert findings(folder, "parallel.tensor=3", ranks=3) == []


def test_many_records_are_read_for_a_while(folder, monkeypatch):
    monkeypatch.setattr(refusals, "READING_S", 0.1)
    write_lines(folder / "data.jsonl", records("samples") * 4000)
    began = time.monotonic()
    (found,) = findings(folder)
    assert found.state == "warn" and "nothing is wrong with what was read in 0.1 s" in found.found
    assert time.monotonic() - began < 5


def test_a_model_of_the_hub_is_not_downloaded(folder):
    (found,) = findings(folder, "model.path=hf://megalign/no-such-model")
    assert found.state == "warn" and "hf://megalign/no-such-model would be downloaded first" in found.found
