"""The layouts that docs/clusters.md begins with fit the models, and take the memory that the tables say."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml

from megalign.config.job import load_config
from megalign.convert.hf.model import read_model
from megalign.doctor.layout import RESERVED, TIGHT
from megalign.engines.build import engine_package
from tests.support.public_models import MODELS, write_public

PAGE = Path(__file__).resolve().parents[1] / "docs/clusters.md"
ROOM = TIGHT * (80e9 - RESERVED["cuda"])  # of a GPU of 80 GB; above it the doctor warns


def rows(engine: str) -> list[dict[str, str]]:
    """The table of an engine's layouts, a row as {heading: cell}."""
    lines = PAGE.read_text().splitlines()
    (start,) = [
        number
        for number, line in enumerate(lines)
        if line.startswith("| model | GPUs |") and ("zero.stage" in line) == (engine == "deepspeed")
    ]
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def overrides(engine: str, row: dict[str, str]) -> list[str]:
    """A row as settings of a job."""
    if engine == "deepspeed":
        settings = [f"engine.{key}={row[key]}" for key in ("zero.stage", "zero.offload_optimizer")]
    else:
        axes = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
        settings = [f"parallel.{axis}={row[axis]}" for axis in axes]
        settings.append(f"parallel.sequence={'true' if row['tensor'] != '1' else 'false'}")
    lengths = [f"data.{key}={row['tokens']}" for key in ("max_length", "tokens_per_micro_batch")]
    return [f"engine.name={engine}", f"engine.recompute={row['recompute']}", *settings, *lengths]


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_rows_fit_model_and_memory(engine, tmp_path):
    seen, wrong = set(), []
    for row in rows(engine):
        name, gpus = row["model"], int(row["GPUs"])
        seen.add(name)
        config = {
            "run": {"dir": "run", "steps": 1},
            "model": {"path": str(write_public(tmp_path / name, name))},
            "data": {"path": "data", "max_length": 8192, "groups_per_step": 64},
            "loss": {"name": "gvpo"},
            "optimizer": {"lr": 1e-6},
        }
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
        cfg = load_config(str(tmp_path / "job.yaml"), overrides(engine, row))
        model, package = read_model(tmp_path / name), engine_package(cfg)
        assert package.layout_problem(cfg, model, gpus, trained=True) is None, row
        need = max(package.rank_needs(cfg, model, gpus, device="cuda"), key=lambda each: each.peak)
        assert need.peak < ROOM, (row, need)
        told = {"GB a GPU": need.peak / 1e9, "GB of the machine": need.offloaded * min(8, gpus) / 1e9}
        wrong += [
            f"{name} on {gpus}: {value:.0f}"
            for key, value in told.items()
            if row.get(key, f"{value:.0f}") != f"{value:.0f}"
        ]
    assert not wrong
    assert seen == {name for name in MODELS if engine == "megatron" or "num_experts" not in MODELS[name]}
