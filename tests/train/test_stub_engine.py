"""A second engine: training knows engines by their registry and protocol alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalign.engines.build import ENGINES
from tests.support.tiny_jobs import metrics, records, train, write_config, write_lines, write_model

# The promise of every layout, which holds between engines too: their sums have another order.
TOLERANCE = {"loss": 1e-5, "grad_norm": 1e-4, "lr": 0.0}


def job(folder: Path, **changes) -> Path:
    folder.mkdir()
    write_model(folder / "model")
    write_lines(folder / "data.jsonl", records("samples"))
    return write_config(folder, **changes)


@pytest.mark.parametrize("loss", ["gvpo", "grpo"])
def test_an_engine_of_plain_torch_trains_like_megatron(tmp_path, monkeypatch, loss):
    changes = {"loss": {"name": loss}, "optimizer": {"weight_decay": 0.1, "clip_norm": 0.5}}
    assert train(job(tmp_path / "megatron", **changes)) == 0
    monkeypatch.setitem(ENGINES, "megatron", "tests.support.stub_engine")
    config = job(tmp_path / "stub", **changes, export={"hf_dir": str(tmp_path / "hf")}, checkpoint={"every": 2})
    assert train(config) == 0
    theirs, mine = (metrics(tmp_path / name / "run") for name in ("megatron", "stub"))
    assert [line["step"] for line in mine] == [1, 2, 3]
    for key, rel in TOLERANCE.items():
        assert [line[key] for line in mine] == pytest.approx([line[key] for line in theirs], rel=rel), key
    assert "plain torch" in (tmp_path / "stub" / "run" / "log.txt").read_text()
    # The run goes on from its checkpoint, to the same third step, and what it exports is a model again.
    assert train(config) == 0
    again = metrics(tmp_path / "stub" / "run")
    assert [(line["step"], line["loss"]) for line in again] == [(line["step"], line["loss"]) for line in mine]
    assert train(write_config(tmp_path / "stub", model={"path": str(tmp_path / "hf")}), f"run.dir={tmp_path}/next") == 0
