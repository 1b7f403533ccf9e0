"""Settings passed through to DeepSpeed change speed and memory alone: two ranks take equal steps with and without."""

from __future__ import annotations

import itertools
import math

import pytest

from megalign.__main__ import main
from megalign.convert.zero.source import ZeroSource
from tests.support.processes import on_two_ranks
from tests.support.tiny_jobs import metrics, records, write_config, write_lines, write_model

ZERO = "engine.deepspeed_config.zero_optimization"
BOTH = [
    f"{ZERO}.{setting}"
    for setting in (
        "contiguous_gradients=false", "reduce_bucket_size=100", "allgather_bucket_size=100", "parameter_alignment=true",
        "reduce_scatter=false", "round_robin_gradients=true", "allgather_partitions=false", "enable_sanity_checks=true",
        "use_multi_rank_bucket_allreduce=false",
    )
]  # fmt: skip
THREE = [
    f"{ZERO}.{setting}"
    for setting in (
        "stage3_param_persistence_threshold=0", "stage3_max_live_parameters=0", "stage3_max_reuse_distance=0",
        "stage3_prefetch_bucket_size=1000", "sub_group_size=500", "memory_efficient_linear=false",
        "leaf_module={classes: [LlamaDecoderLayer]}",
    )
]  # fmt: skip
JOBS = {
    "2 plain": ["engine.zero.stage=2"],
    "2 set": ["engine.zero.stage=2", *BOTH],
    # Alone: with parameter_alignment, DeepSpeed notes the places of parameters in another way.
    "2 in turn": ["engine.zero.stage=2", f"{ZERO}.round_robin_gradients=true"],
    "1 in turn, offloaded": [
        "engine.zero.stage=1", f"{ZERO}.round_robin_gradients=true", "engine.zero.offload_optimizer=true",
    ],
    "3 plain": ["engine.zero.stage=3"],
    "3 set": ["engine.zero.stage=3", *BOTH, *THREE],
    "3 gathered in turn": ["engine.zero.stage=3", THREE[0], f"{ZERO}.stage3_allgather_sequential=true"],
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passed")
    write_model(folder / "model")
    write_lines(folder / "data.jsonl", records("samples"))
    config = write_config(folder, engine={"name": "deepspeed"})
    jobs = [
        ["train", str(config), *settings, f"run.dir={folder}/{name.replace(' ', '_')}"]
        for name, settings in JOBS.items()
    ]
    on_two_ranks(folder, [(job, 0) for job in jobs])
    return {name: folder / name.replace(" ", "_") for name in JOBS}


@pytest.mark.slow
def test_nvme_keeps_optimizer_and_weights(tmp_path):
    """Needs libaio's headers and a compiler, and the first time minutes to compile."""
    pytest.importorskip("deepspeed")
    from megalign.engines.deepspeed.library import can_use_nvme

    if not can_use_nvme():
        pytest.skip("DeepSpeed cannot compile its access to NVMe here")
    write_model(tmp_path / "model")
    write_lines(tmp_path / "data.jsonl", records("samples"))
    config, disk = write_config(tmp_path, engine={"name": "deepspeed"}), tmp_path / "disk"
    disk.mkdir()
    where = [f"{ZERO}.offload_{what}={{device: nvme, nvme_path: {disk}}}" for what in ("optimizer", "param")]
    switches = ["engine.zero.stage=3", "engine.zero.offload_optimizer=true", "engine.zero.offload_params=true"]
    jobs = {
        "plain": (["engine.zero.stage=3"], 3),
        "on disk": ([*switches, *where], 2),
        "on disk, resumed": ([*switches, *where], 3),
    }
    for name, (settings, steps) in jobs.items():
        folder = tmp_path / name.split(",")[0].replace(" ", "_")
        assert main(["train", str(config), *settings, f"run.steps={steps}", f"run.dir={folder}"]) == 0
    lines = zip(metrics(tmp_path / "on_disk"), metrics(tmp_path / "plain"), strict=True)
    for key, (line, other) in itertools.product(("loss", "grad_norm"), lines):
        assert line[key] == pytest.approx(other[key], rel=1e-6)


@pytest.mark.parametrize("name", [name for name in JOBS if name != "2 plain"])
def test_steps_are_those_of_plain_stage_2(runs, name):
    steps = [line for line in metrics(runs[name]) if line["step"]]
    expected = [line for line in metrics(runs["2 plain"]) if line["step"]]
    assert len(steps) == len(expected) == 3
    for line, other in zip(steps, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("name", [name for name in JOBS if name != "2 plain"])
def test_checkpoints_are_those_of_plain_stage_2(runs, name):
    right, found = (ZeroSource(runs[each] / "checkpoints" / "step_00000003" / "zero") for each in ("2 plain", name))
    assert found.specs == right.specs
    for (key, spec), kind in itertools.product(right.specs.items(), right.index.kinds):
        whole, other = (each.read(key, kind, 0, math.prod(spec.shape)) for each in (found, right))
        assert float((whole - other).abs().max()) <= 1e-5 * float(other.abs().max()), f"{kind} {key}"
