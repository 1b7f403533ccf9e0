"""Weights that come from elsewhere: references of another shape, converted checkpoints, and files not to be trusted."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from megalign.convert.transfer import hf_to_megatron
from tests.support.tiny_jobs import (
    hf_logps,
    metrics,
    read_lines,
    records,
    status,
    train,
    write_config,
    write_lines,
    write_model,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    write_lines(tmp_path / "data.jsonl", records("samples"))
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"hidden_size": 16, "num_hidden_layers": 3},
    ],
    ids=["rope", "shape"],
)
def test_reference_is_scored_as_its_own_model(changes: dict[str, object], folder: Path) -> None:
    write_model(folder / "reference", **changes)
    config = write_config(folder, run={"steps": 1, "dump_steps": [1]})
    assert train(config, f"reference.source={folder / 'reference'}") == 0
    for one in read_lines(folder / "run" / "steps" / "step_1.jsonl"):
        expected = hf_logps(folder / "reference", one["prompt_ids"], one["response_ids"]).sum().item()
        assert one["reference_logp"] == pytest.approx(expected, rel=1e-5)
        assert one["logp"] != pytest.approx(expected, rel=1e-3)


def test_converted_checkpoint_gives_the_first_weights(folder: Path) -> None:
    write_model(folder / "other", seed=5)
    hf_to_megatron(str(folder / "other"), folder / "converted")
    assert train(write_config(folder), f"checkpoint.resume={folder / 'converted'}") == 0
    resumed = metrics(folder / "run")
    assert train(write_config(folder, run={"dir": str(folder / "b")}), f"model.path={folder / 'other'}") == 0
    assert resumed[0]["pass_mode"] == "known_scores"
    assert [line["loss"] for line in resumed] == [line["loss"] for line in metrics(folder / "b")]


class Harmful:
    """Unpickles into a file that should never be."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.target,)


def test_checkpoint_index_that_names_other_code_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf_to_megatron(str(folder / "model"), folder / "converted")
    (folder / "converted" / ".metadata").write_bytes(pickle.dumps(Harmful(folder / "harm")))
    assert train(write_config(folder), f"checkpoint.resume={folder / 'converted'}") == 2
    assert "it names pathlib" in capsys.readouterr().err
    assert status(folder / "run")["code"] == 2
    assert not (folder / "harm").exists()


def test_export_never_replaces_what_the_job_reads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(folder, export={"hf_dir": str(folder / "out")})
    assert train(config) == 0
    assert train(config, f"reference.source={folder / 'out'}") == 2
    assert "export.hf_dir" in capsys.readouterr().err
    assert train(config) == 0  # an earlier export of ours is replaced
