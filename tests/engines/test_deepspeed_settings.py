"""The dictionary that DeepSpeed is started with: accepted at every stage, and one step of it is AdamW's."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch

from megalign.config.job import load_config
from megalign.convert.hf.model import read_model
from megalign.engines.deepspeed.settings import ds_config
from tests.support.families import write_family
from tests.support.processes import run_ranks
from tests.support.tiny_jobs import write_config

RATE, CLIP = 0.01, 0.5
# (stage, dtype, offload of the optimizer, of the weights)
CASES = [
    (stage, dtype, optimizer, params)
    for stage, dtype, optimizer, params in itertools.product((1, 2, 3), ("fp32", "bf16"), (False, True), (False, True))
    if stage == 3 or not params
]


def config(folder: Path, *, stage: int = 2, dtype: str = "fp32", optimizer: bool = False, params: bool = False, **more):
    zero = {"stage": stage, "offload_optimizer": optimizer, "offload_params": params}
    path = write_config(
        folder,
        engine={"name": "deepspeed", "zero": zero, **more},
        run={"dtype": dtype},
        optimizer={"lr": RATE, "clip_norm": CLIP},
    )
    return load_config(str(path))


def test_own_settings_and_those_passed_through(tmp_path):
    passed = {"zero_optimization": {"reduce_bucket_size": 1000, "stage3_max_live_parameters": 7}, "aio": {"a": 1}}
    settings = ds_config(config(tmp_path, deepspeed_config=passed), zero_size=2, on_cuda=True)
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["reduce_bucket_size"]) == (2, True, 1000)
    assert (zero["stage3_max_live_parameters"], settings["aio"]) == (7, {"a": 1})
    assert settings["gradient_clipping"] == CLIP and settings["gradient_allreduce_op"] == "sum"


def test_one_rank_brings_no_gradients_together(tmp_path):
    alone = ds_config(config(tmp_path), zero_size=1, on_cuda=True)["zero_optimization"]
    assert (alone["overlap_comm"], alone["reduce_bucket_size"]) == (False, 1)
    offloaded = ds_config(config(tmp_path, optimizer=True), zero_size=1, on_cuda=True)["zero_optimization"]
    assert offloaded["reduce_bucket_size"] > 1  # DeepSpeed copies single gradients there


def test_stage_3_averages_and_offload_goes_to_nvme(tmp_path):
    passed = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}
    cfg = config(tmp_path, stage=3, optimizer=True, params=True, deepspeed_config=passed)
    settings = ds_config(cfg, zero_size=2, on_cuda=True)
    assert "gradient_allreduce_op" not in settings  # DeepSpeed refuses it there
    zero = settings["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "nvme", "nvme_path": "/tmp", "pin_memory": True}
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}


def one_step(settings: dict, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights after a step that DeepSpeed took from two micro-batches, and after the same step of AdamW in fp32."""
    import deepspeed

    torch.manual_seed(0)
    module = torch.nn.Linear(8, 4, bias=False).to(dtype)
    plain = torch.nn.Linear(8, 4, bias=False)
    plain.load_state_dict({"weight": module.weight.detach().float()})
    rows = torch.randn(6, 8).to(dtype)
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, eps=1e-5)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    for part in (rows[:2], rows[2:]):
        engine.backward(engine(part).float().square().sum() * 10)
    engine.step()
    expected = torch.optim.AdamW(plain.parameters(), lr=RATE, eps=1e-5)
    (plain(rows.float()).square().sum() * 10).backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), CLIP)
    expected.step()
    assert float(engine.get_global_grad_norm()) == pytest.approx(
        float(norm), rel=1e-5 if dtype == torch.float32 else 0.02
    )
    with deepspeed.zero.GatheredParameters(engine.module.weight, enabled=settings["zero_optimization"]["stage"] == 3):
        weight = engine.module.weight.detach().float().clone()
    engine.destroy()
    return weight, plain.weight.detach()


def all_cases(folder: Path) -> None:
    """Start DeepSpeed with the settings of every case, and compare one step."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler
    deepspeed.init_distributed("gloo")
    for stage, dtype, optimizer, params in CASES:
        cfg = config(folder, stage=stage, dtype=dtype, optimizer=optimizer, params=params)
        settings = ds_config(cfg, zero_size=1, on_cuda=False)
        own = torch.float32 if dtype == "fp32" else torch.bfloat16
        weight, expected = one_step(settings, own)
        # a weight moves by the rate, and bf16 rounds weights below 0.5 to 2 ** -9
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6 if dtype == "fp32" else 2e-3)


def test_deepspeed_takes_the_settings_and_steps_as_adamw(tmp_path):
    run_ranks(all_cases, 1, tmp_path)


def partitioned_models(folder: Path) -> None:
    """Build a partitioned model in each dtype, on processors that can and cannot compute in fp16."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    from megalign.engines.deepspeed import factory

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler
    deepspeed.init_distributed("gloo")
    model = read_model(folder / "mixtral")
    for dtype, own in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        cfg = config(folder, stage=3, dtype=dtype)
        for fp16 in (True, False):
            deepspeed.get_accelerator().is_fp16_supported = lambda fp16=fp16: fp16
            settings = ds_config(cfg, zero_size=1, on_cuda=False)
            built = factory._empty_model(cfg, model, settings, torch.device("cpu"))
            assert {parameter.dtype for parameter in built.parameters()} == {own}, (dtype, fp16)
            assert all(hasattr(parameter, "ds_id") for parameter in built.parameters())


def test_partitioned_weights_have_the_runs_dtype_on_every_processor(tmp_path):
    write_family(tmp_path / "mixtral", "mixtral")
    run_ranks(partitioned_models, 1, tmp_path)
