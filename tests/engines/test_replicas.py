"""One bit of one rank's copy is seen, named and told apart from what every rank has its own part of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megalign.config.job import JobConfig
from megalign.convert.hf.model import read_model
from megalign.engines.build import engine_package
from megalign.engines.deepspeed.policy import gathered
from megalign.engines.replicas import bit_sum, first_difference
from megalign.ops.head_blocks import HeadConfig
from megalign.runtime.distributed import process_group
from tests.support.parity_cases import write_checkpoints
from tests.support.processes import run_ranks

# Model, sections of the configuration, and the parameters of which rank 1's copy gets another bit, with their axis.
CASES = {
    "megatron data": ("llama", {}, {"decoder.layers.1.mlp.linear_fc2.weight": "data"}),
    "megatron tensor": (
        "llama-scaled-biased",
        {"parallel": {"tensor": 2}},
        {"decoder.layers.0.input_layernorm.weight": "tensor", "decoder.layers.3.mlp.linear_fc2.bias": "tensor"},
    ),
    "megatron experts": (
        "qwen3_moe",
        {"parallel": {"tensor": 2, "sequence": True}},
        {"decoder.layers.1.mlp.router.weight": "tensor"},
    ),
    "megatron adapters": (
        "llama",
        {"parallel": {"tensor": 2}, "lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}},
        {"model.layers.0.self_attn.q_proj.lora_A.weight": "tensor"},
    ),
    "zero 2": ("llama", {"engine": {"name": "deepspeed"}}, {"model.layers.1.mlp.down_proj.weight": "data"}),
    "zero 3": (
        "llama",
        {"engine": {"name": "deepspeed", "zero": {"stage": 3}}},
        {"model.layers.0.input_layernorm.weight": "data"},
    ),
    "zero 2 tensor": (
        "llama",
        {"engine": {"name": "deepspeed"}, "parallel": {"tensor": 2}},
        {"decoder.final_layernorm.weight": "tensor"},
    ),
}


def head_of(engine: Any) -> HeadConfig:
    """How an engine computes its head."""
    holder = getattr(engine, "policy", engine)
    return getattr(holder, "shard", holder).head_cfg


def plant(folder: str) -> None:
    """Compare each case's ranks as they are, and with one bit changed on rank 1; rank 0 keeps what is said."""
    found: dict[str, list[str]] = {}
    with process_group(timeout_s=120) as world:
        for case, (model, sections, planted) in CASES.items():
            raw = {
                "run": {"dir": "unused", "steps": 1, "dtype": "fp32"},
                "model": {"path": str(Path(folder, model, "policy"))},
                "data": {"path": "unused", "max_length": 32, "groups_per_step": 1, "tokens_per_micro_batch": 64},
                "loss": {"name": "sft"},
                "optimizer": {"lr": 1e-3},
            }
            # Every way to build an engine is here: each must hand the head what the configuration says.
            sections = {**sections, "engine": {**sections.get("engine", {}), "head_kernel": "compiled"}}
            cfg = JobConfig.model_validate({**raw, **sections})
            package = engine_package(cfg)
            engine = package.build(
                cfg, read_model(Path(cfg.model.path)), package.connect(cfg, world), world, trainable=True
            )
            assert head_of(engine).compiled is not None, case
            engine.load_weights(Path(cfg.model.path))
            if "zero" in sections.get("engine", {}):  # as after a step: small parameters are whole on every rank
                with gathered([each for each in engine.policy.parameters() if each.ds_persist], keep=True):
                    pass
            found[case] = [first_difference(engine.replicas(), device=engine.device)]
            for name, axis in planted.items():
                held = {(each.name, each.axis): each.tensor for each in engine.replicas()}
                bits = held[name, axis].data.view(-1).view(torch.uint8)[:1]
                bits ^= world.rank
                found[case].append(first_difference(engine.replicas(), device=engine.device))
                bits ^= world.rank
            found[case].append(first_difference(engine.replicas(), device=engine.device))
        if world.rank == 0:
            Path(folder, "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    for model in {model for model, _, _ in CASES.values()}:
        write_checkpoints(folder, model)
    run_ranks(plant, 2, str(folder), timeout_s=300)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_one_bit_on_one_rank_is_seen(case, found):
    told = [
        f"parameter {name}: {axis} ranks must have the same bits, but rank 0 and rank 1 differ"
        for name, axis in CASES[case][2].items()
    ]
    assert found[case] == ["", *told, ""]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_equal_bits_have_equal_sums_and_one_unit_in_the_last_place_another(dtype):
    one = torch.arange(1, 1001).remainder(97).to(dtype)
    other = one.clone().view(10, 100)
    assert bit_sum(one) == bit_sum(other) == bit_sum(other.T.contiguous().T)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[other.element_size()]
    other.view(-1).view(whole)[500] += 1
    assert bit_sum(one) != bit_sum(other)
    assert bit_sum(torch.zeros(3)) != bit_sum(-torch.zeros(3))
    shifted = torch.cat([one[:1], one])[1:]  # begins in the middle of eight bytes
    assert bit_sum(shifted) == bit_sum(one) and bit_sum(shifted[:-1]) == bit_sum(one[:-1].clone())
