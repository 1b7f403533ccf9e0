"""Ranks that would compute different things do not begin."""

from __future__ import annotations

import os
from pathlib import Path

from megalign.train.alike import first_difference
from tests.support.processes import run_ranks
from tests.support.tiny_jobs import records, status, write_config, write_lines, write_model


def test_the_item_its_values_and_the_ranks_are_named():
    items = [{"torch": "2.13.0", "transformers": "5.23.0"} for _ in range(6)]
    assert first_difference(items) == ""
    items[4]["transformers"] = "5.0.1"
    assert first_difference(items) == (
        "transformers is 5.23.0 on ranks 0-3, 5, 5.0.1 on rank 4; must be the same on all ranks of a job"
    )
    del items[1]["torch"]  # a key of a configuration that only some ranks have
    assert first_difference(items).startswith("torch is 2.13.0 on ranks 0, 2-5, absent on rank 1; must be ")


def differing(config: str, folder: str) -> None:
    """Rank 1 has another learning rate; then other data, under the same name in a directory of its own."""
    from megalign.__main__ import main

    rank = int(os.environ["RANK"])
    os.chdir(Path(folder, f"of_rank_{rank}"))
    for number, override in enumerate(([f"optimizer.lr={1e-3 * (1 + rank)}"], ["data.path=data.jsonl"])):
        run_dir = Path(folder, f"run_{number}")
        port = str(int(os.environ["MASTER_PORT"]) + 1)
        assert main(["train", config, *override, f"run.dir={run_dir}"]) == 2
        os.environ["MASTER_PORT"] = port


def test_a_rank_with_another_configuration_or_other_data_is_refused(tmp_path):
    write_model(tmp_path / "model")
    write_lines(tmp_path / "data.jsonl", records("samples"))
    for rank in range(2):
        (tmp_path / f"of_rank_{rank}").mkdir()
        changed = records("samples")
        changed[3]["responses"][0]["reward"] += 0.25 * rank
        write_lines(tmp_path / f"of_rank_{rank}" / "data.jsonl", changed)
    run_ranks(differing, 2, str(write_config(tmp_path)), str(tmp_path), timeout_s=120)
    held = [status(tmp_path / f"run_{number}") for number in range(2)]
    assert [each["code"] for each in held] == [2, 2]
    assert held[0]["reason"] == (
        "optimizer.lr is 0.001 on rank 0, 0.002 on rank 1; must be the same on all ranks of a job"
    )
    assert held[1]["reason"].startswith("the records of data.path is ") and " on rank 1; must be " in held[1]["reason"]
    assert not (tmp_path / "run_1" / "checkpoints").exists() and not (tmp_path / "run_1" / "log.txt").exists()
