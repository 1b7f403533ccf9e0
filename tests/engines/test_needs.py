"""What a job takes is estimated from shapes as it turns out to be: parameters, checkpoints, memory."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megalign.config.job import load_config
from megalign.config.layout import layers_by_stage, split_layers
from megalign.convert.hf.model import read_model
from megalign.engines.build import engine_package, packing_of
from megalign.engines.step import accumulate
from megalign.models.transformer_config import layers_of_split
from megalign.runtime.distributed import process_group
from megalign.train.check import check
from megalign.train.feeds import DatasetFeed
from tests.support.processes import run_ranks
from tests.support.tiny_checkpoints import write_checkpoint
from tests.support.tiny_jobs import records, train, write_config, write_lines, write_model

# Of the estimate over the truth: memory that libraries take, and what the allocator keeps, vary.
FACTOR = 1.5
LAYOUTS = {
    "dense": [
        ["parallel.tensor=2", "parallel.sequence=true"],
        ["parallel.pipeline=2"],
        ["parallel.pipeline=2", "lora.rank=2", "lora.alpha=4"],
        ["parallel.tensor=2", "lora.rank=2", "lora.alpha=4"],
        [],
    ],
    "experts": [["parallel.expert=2"], ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2"]],
}


def test_parameters_of_every_rank_are_counted_exactly(tmp_path):
    for name in LAYOUTS:
        (tmp_path / name).mkdir()
        write_config(tmp_path / name)
    write_model(tmp_path / "dense/model", num_hidden_layers=3)
    write_checkpoint(tmp_path / "experts/model", "mixtral", num_attention_heads=4, num_key_value_heads=2)
    run_ranks(_count, 2, tmp_path)


def _count(folder: Path) -> None:
    with process_group(timeout_s=60) as world:
        for name, layouts in LAYOUTS.items():
            for overrides in layouts:
                cfg = load_config(str(folder / name / "job.yaml"), overrides)
                model, package = read_model(Path(cfg.model.path)), engine_package(cfg)
                needs = package.rank_needs(cfg, model, world.size, device="cpu")
                need = needs[world.rank * len(needs) // world.size]
                connection = package.connect(cfg, world)
                engine = package.build(cfg, model, connection, world, trainable=True)
                parameters = [each for chunk in engine.shard.chunks for each in chunk.parameters()]
                assert need.num_parameters == sum(each.numel() for each in parameters), (name, overrides)
                trained = sum(each.numel() for each in parameters if each.requires_grad)
                assert need.gradients == 4 * trained
                held = sum(state.numel() for part in engine.optimizer.chained_optimizers for state in _owned(part))
                assert need.optimizer == pytest.approx(8 * held, rel=0.02)  # uneven shares of data ranks


def _owned(part) -> list:
    return [each for group in part.optimizer.param_groups for each in group["params"]]


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
@pytest.mark.parametrize("overrides", [["run.dtype=fp32"], ["run.dtype=bf16", "lora.rank=64", "lora.alpha=4"]])
def test_the_size_of_a_checkpoint(tmp_path, engine, overrides):
    write_model(tmp_path / "model", hidden_size=256, intermediate_size=512)
    write_lines(tmp_path / "data.jsonl", records("samples"))
    config = write_config(tmp_path, run={"steps": 1}, engine={"name": engine})
    assert train(config, *overrides) == 0
    cfg = load_config(str(config), overrides)
    estimate = engine_package(cfg).checkpoint_bytes(cfg, read_model(Path(cfg.model.path)))
    written = sum(path.stat().st_size for path in (tmp_path / "run/checkpoints").rglob("*") if path.is_file())
    assert estimate == pytest.approx(written, rel=0.05)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        pytest.param(["engine.recompute=full"], marks=pytest.mark.slow),
        pytest.param(["run.dtype=bf16"], marks=pytest.mark.slow),
    ],
)
def test_memory_of_a_step_is_estimated(tmp_path, overrides):
    draw = random.Random(1)
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}
    write_model(tmp_path / "model", vocab_size=8000, max_position_embeddings=512, **sizes)
    lines = [{name: [draw.randrange(8000) for _ in range(128)] for name in ("prompt_ids", "response_ids")}] * 16
    write_lines(tmp_path / "data.jsonl", lines)
    data = {"max_length": 512, "groups_per_step": 16, "tokens_per_micro_batch": 4096}
    run_ranks(_measure, 1, write_config(tmp_path, loss={"name": "sft"}, data=data), overrides)


def _measure(config: Path, overrides: list[str]) -> None:
    cfg = load_config(str(config), overrides)
    with process_group(timeout_s=60) as world:
        inputs, package = check(cfg, world.size), engine_package(cfg)
        assert inputs.records is not None
        feed, connection = DatasetFeed(cfg, inputs.records.dataset), package.connect(cfg, world)
        before = _memory("VmRSS")
        engine = package.build(cfg, inputs.policy, connection, world, trainable=True)
        engine.load_weights(inputs.policy.folder)
        for step in range(2):
            accumulate(engine, feed.batch(step), cfg.loss, packing=packing_of(cfg))
            engine.update(1e-4)
        (need,) = package.rank_needs(cfg, inputs.policy, world.size, device="cpu")
        taken = _memory("VmHWM") - before
        assert 1 / FACTOR < need.peak / taken < FACTOR, (overrides, need, taken)


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def test_layers_of_stages():
    assert layers_by_stage(split_layers(5, 2), 2) == [[[0, 1, 2]], [[3, 4]]]
    assert layers_by_stage(split_layers(4, 4), 2) == [[[0], [2]], [[1], [3]]]
    assert layers_by_stage(layers_of_split("Et|ttttL", 2), 2) == [[[0]], [[1, 2, 3, 4]]]
    assert layers_of_split("E|tt|t|tL", 2) == [0, 2, 1, 1]
