"""Quick hashes tell files apart, and models of the Hub count only where their weights are in the cache."""

from __future__ import annotations

import time
from pathlib import Path

import huggingface_hub.constants
import pytest

from megalign.config.job import load_config
from megalign.convert.hf.reader import cached_model
from megalign.doctor.input_files import BLOCK_BYTES, WHOLE_BYTES, Input, differing, digests, inputs_of, signature
from tests.support.tiny_jobs import write_config, write_lines, write_model


def hashes(path: Path) -> dict[str, str]:
    found, problem = digests(Input("data.path", str(path), path), time.monotonic() + 60)
    assert problem == ""
    return found


@pytest.mark.parametrize("size", [10, WHOLE_BYTES, 5 * WHOLE_BYTES])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_changed_byte_changes_the_hash(tmp_path, size, place):
    at = {"first": 0, "middle": (size - BLOCK_BYTES) // 2 if size > WHOLE_BYTES else size // 2, "last": size - 1}[place]
    content = bytearray(size)
    path = tmp_path / "file"
    path.write_bytes(content)
    before = hashes(path)
    content[at] = 1
    path.write_bytes(content)
    assert differing(hashes(path), before) == ["file has other content"]


def test_differences_of_folders(tmp_path):
    write_lines(tmp_path / "a", [1, 2])
    write_lines(tmp_path / "b", [1])
    before = hashes(tmp_path)
    write_lines(tmp_path / "a", [1])
    (tmp_path / "b").rename(tmp_path / "c")
    assert differing(hashes(tmp_path), before) == ["b is missing", "a has 2 bytes, not 4", "c is only there"]


def test_what_cannot_be_read(tmp_path):
    def problem(path: Path | None) -> str:
        return digests(Input("data.path", "", path), time.monotonic())[1]

    assert problem(tmp_path / "none") == "no such file or directory"
    assert problem(tmp_path) == "no files in it"
    assert problem(None) == "not here"


def test_the_inputs_of_a_job(tmp_path):
    write_model(tmp_path / "model")
    write_lines(tmp_path / "data.jsonl", [])
    cfg = load_config(str(write_config(tmp_path)), [f"eval.path={tmp_path}/eval.jsonl"])
    inputs = inputs_of(cfg, tmp_path / "job.yaml")
    assert [each.field for each in inputs] == ["configuration", "model.path", "data.path", "eval.path"]
    assert inputs[1].files().keys() == {"config.json", "generation_config.json", "model.safetensors"}
    before = signature(inputs)
    assert signature(inputs) == before
    write_lines(tmp_path / "eval.jsonl", [])
    assert signature(inputs) != before


def test_models_of_the_hub_count_where_they_are_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--name" / "snapshots" / "0123456789012345678901234567890123456789"
    write_model(folder)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text(folder.name)
    assert cached_model("hf://org/name") == folder
    assert cached_model("hf://org/other") is None
    (folder / "model.safetensors").unlink()
    assert cached_model("hf://org/name") is None
    assert cached_model(str(folder)) == folder  # its config.json is there
    assert cached_model(str(tmp_path)) is None
