"""Keys of the DeepSpeed engine: what the sections say together, and a list of DeepSpeed's keys that is complete."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from megalign.config.deepspeed_keys import DEEPSPEED_OWNED, DEEPSPEED_SETTINGS, SECTIONS, ZERO, may_pass, owned_problem
from megalign.config.job import dump_config, load_config
from megalign.schema import UserError
from tests.support.tiny_jobs import write_config


@pytest.fixture
def load(tmp_path):
    (tmp_path / "data.jsonl").write_text("")
    path = write_config(tmp_path, engine={"name": "deepspeed"})
    return lambda *overrides: load_config(str(path), overrides)


def test_defaults_are_those_of_stage_2(load):
    zero = load().engine.zero
    assert (zero.stage, zero.offload_optimizer, zero.offload_params) == (2, False, False)


def test_what_may_pass_comes_through_and_back(load, tmp_path):
    cfg = load(
        "engine.zero={stage: 3, offload_optimizer: true, offload_params: true}",
        "engine.deepspeed_config.zero_optimization.stage3_max_live_parameters=1e9",
        "engine.deepspeed_config.zero_optimization.offload_optimizer={device: nvme, nvme_path: /tmp}",
        "engine.deepspeed_config.zero_optimization.offload_param.pin_memory=false",
        "engine.deepspeed_config.aio.queue_depth=16",
        "parallel={tensor: 2, context: 2}",
        "lora={rank: 2, alpha: 4, targets: [c_attn]}",
    )
    assert cfg.engine.deepspeed_config["aio"] == {"queue_depth": 16}
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(cfg))
    assert load_config(str(copy)) == cfg


def test_layers_of_other_names_are_for_deepspeed_alone(load):
    with pytest.raises(UserError, match=r"lora.targets.0 is 'c_attn': must be 'q_proj', .* or 'down_proj'"):
        load("lora={rank: 2, alpha: 4, targets: [c_attn]}", "engine.name=megatron")


def test_a_path_below_the_run_directory_is_filled_in(load):
    cfg = load(
        "engine.zero={stage: 3, offload_params: true}",
        "engine.deepspeed_config.zero_optimization.offload_param={device: nvme, nvme_path: '{run.dir}/swap'}",
    )
    assert cfg.engine.deepspeed_config[ZERO]["offload_param"]["nvme_path"] == f"{cfg.run.dir}/swap"


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_only_its_engine_reads_a_section(load, engine):
    other = {"megatron": "deepspeed_config.aio.queue_depth=1", "deepspeed": "megatron.bucket_size=1"}[engine]
    with pytest.raises(UserError, match=f"only engine.name {'megatron' if engine == 'deepspeed' else 'deepspeed'} rea"):
        load(f"engine.name={engine}", f"engine.{other}")


def test_a_key_is_owned_or_may_pass():
    assert [key for key in DEEPSPEED_OWNED if may_pass(key)] == []
    assert owned_problem({"aio": {"queue_depth": 1}, ZERO: {"stage": 1}}) == (
        f"{ZERO}.stage", 1, "set it with engine.zero.stage",
    )  # fmt: skip
    assert owned_problem({ZERO: {"overlap_comm": True}}) is None


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_every_key_of_deepspeeds_zero_is_listed():
    config, offload = (import_module(f"deepspeed.runtime.zero.{name}") for name in ("config", "offload_config"))
    classes = {
        ZERO: config.DeepSpeedZeroConfig,
        f"{ZERO}.offload_optimizer": offload.DeepSpeedZeroOffloadOptimizerConfig,
        f"{ZERO}.offload_param": offload.DeepSpeedZeroOffloadParamConfig,
    }
    known = {*DEEPSPEED_SETTINGS, *SECTIONS, *DEEPSPEED_OWNED}
    for section, model in classes.items():
        names = {f"{section}.{field.alias or name}" for name, field in model.model_fields.items()}
        assert names - known == set()


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_every_section_that_deepspeed_reads_is_listed():
    """All names that DeepSpeedConfig looks up, which its constants hold."""
    constants = import_module("deepspeed.runtime.constants")
    config = import_module("deepspeed.runtime.config")
    source = Path(config.__file__).read_text(encoding="utf-8")
    asked = set(re.findall(r"get_scalar_param\(param_dict, ([A-Z_]+),", source))
    names = {getattr(constants, name) for name in asked if isinstance(getattr(constants, name, None), str)}
    names |= set(re.findall(r"param_dict(?:\.get\(|\[)['\"](\w+)['\"]", source))
    names |= set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert len(names) > 25
    assert sorted(names - {*DEEPSPEED_OWNED, *SECTIONS}) == []
