"""What the DeepSpeed engine refuses: one line that says where, which value and what is allowed; code 2; nothing left.

Every case goes through the command line.
"""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import transformers

from megalign.config.job import load_config
from megalign.convert.hf.model import read_model
from megalign.engines.deepspeed.check import layout_problem
from tests.support.auto_checkpoints import write_auto_checkpoint
from tests.support.families import write_family
from tests.support.tiny_checkpoints import write_checkpoint
from tests.support.tiny_jobs import (
    VOCAB_SIZE,
    records,
    save_drawn,
    status,
    train,
    write_config,
    write_lines,
    write_model,
)

ZERO = "engine.deepspeed_config.zero_optimization"
PASSED = f"{ZERO}."


def write_gpt2(folder, **changes):
    """A model that megalign's tables lack: 6 heads, and no linear layer of torch but its head."""
    sizes = {"n_layer": 2, "n_embd": 24, "n_head": 6, "vocab_size": VOCAB_SIZE, "n_positions": 64, "bos_token_id": 0}
    config = transformers.GPT2Config(**{**sizes, "eos_token_id": 0, **changes})
    save_drawn(transformers.GPT2LMHeadModel(config), folder)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    write_model(folder / "model")
    write_gpt2(folder / "gpt2")
    write_gpt2(folder / "lacking", n_layer=1)
    config = transformers.OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    save_drawn(transformers.OpenAIGPTLMHeadModel(config), folder / "openai")
    own = json.loads((folder / "gpt2" / "config.json").read_text())
    (folder / "lacking" / "config.json").write_text(json.dumps(own))
    shutil.copytree(folder / "gpt2", folder / "own_code")
    code = {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}
    (folder / "own_code" / "config.json").write_text(json.dumps(own | code))
    (folder / "own_code" / "modeling.py").write_text("raise SystemExit(3)\n")
    write_checkpoint(folder / "mixed", "qwen3-moe")
    write_auto_checkpoint(folder / "alibi", "bloom")
    write_family(folder / "long", "phi3-long")
    write_lines(folder / "data.jsonl", records("samples"))
    return folder


STAGE_3 = ["engine.zero.stage=3"]
NOWHERE = "={{device: nvme, nvme_path: /proc/none}}"
# name: (overrides, parts of the line)
CASES: dict[str, tuple[list[str], list[str]]] = {
    # engine.zero
    "stage 0": (["engine.zero.stage=0"], ["engine.zero.stage is 0", "must be 1, 2 or 3"]),
    "unknown key of zero": (["engine.zero.offload=true"], ["engine.zero.offload is not a known key", "offload_params"]),
    "weights offloaded at stage 2": (
        ["engine.zero.offload_params=true"],
        ["engine.zero.offload_params is true", "engine.zero.stage is 2", "stage 3"],
    ),
    # what the other engine has
    "Megatron's settings": (
        ["engine.megatron.overlap_grad_reduce=true"], ["engine.megatron is {", "only engine.name megatron reads it"],
    ),
    "TransformerEngine": (["engine.layers=transformer_engine"], ["engine.layers is 'transformer_engine'", "auto"]),
    "pipeline": (["parallel.pipeline=2"], ["parallel.pipeline is 2", "must be 1, or engine.name megatron"]),
    "virtual pipeline": (["parallel.virtual_pipeline=2"], ["parallel.virtual_pipeline is 2", "engine.name megatron"]),
    "experts": (["parallel.expert=2"], ["parallel.expert is 2", "are the Megatron engine's", "engine.name megatron"]),
    "sequence": (["parallel.sequence=true"], ["parallel.sequence is true", "must be false, or engine.name megatron"]),
    "load-balancing loss": (
        ["model.aux_loss_coefficient=0.01"], ["model.aux_loss_coefficient is 0.01", "must be 0, or engine.name"],
    ),
    # layouts
    "tensor above ranks": (
        ["parallel.tensor=2"],
        ["parallel.tensor x parallel.context is 2 x 1 = 2", "number of ranks 1", "nearest layouts of 1 ranks"],
    ),
    "context above ranks": (["parallel.context=2"], ["parallel.context is 1 x 2 = 2", "number of ranks 1"]),
    # keys that megalign owns
    "batch size": (
        ["engine.deepspeed_config.train_batch_size=8"],
        ["engine.deepspeed_config.train_batch_size is 8", "must be left out", "data.groups_per_step"],
    ),
    "accumulation": (
        ["engine.deepspeed_config.gradient_accumulation_steps=4"],
        ["gradient_accumulation_steps is 4", "data.tokens_per_micro_batch"],
    ),
    "clipping": (["engine.deepspeed_config.gradient_clipping=1.0"], ["clipping is 1.0", "optimizer.clip_norm"]),
    "optimizer": (
        ["engine.deepspeed_config.optimizer={{type: AdamW}}"],
        ["deepspeed_config.optimizer is {'type': 'AdamW'}", "set it with the optimizer section"],
    ),
    "scheduler": (["engine.deepspeed_config.scheduler.type=x"], ["scheduler is", "set it with optimizer.schedule"]),
    "number format": (["engine.deepspeed_config.bf16.enabled=true"], ["bf16 is", "set it with run.dtype"]),
    "stage twice": ([f"{PASSED}stage=1"], [f"{PASSED}stage is 1", "set it with engine.zero.stage"]),
    "recomputation": (
        ["engine.deepspeed_config.activation_checkpointing.cpu_checkpointing=true"], ["set it with engine.recompute"],
    ),
    "quantised gradients": (
        [f"{PASSED}zero_quantized_gradients=true"], ["zero_quantized_gradients is True", "changes the numbers"],
    ),
    "logger": (["engine.deepspeed_config.tensorboard.enabled=true"], ["tensorboard is", "set it with trackers"]),
    "offload the old way": ([f"{PASSED}cpu_offload=true"], ["is True", "set engine.zero.offload_optimizer"]),
    # keys and values that DeepSpeed does not know
    "misspelt key": (
        [f"{PASSED}overlap_com=true"],
        [f"{PASSED}overlap_com is not a known key; did you mean overlap_comm?", "must be one of allgather_bucket_size"],
    ),
    "key in another section": (
        ["engine.deepspeed_config.overlap_comm=true"],
        ["engine.deepspeed_config.overlap_comm is not a known key; did you mean zero_optimization.overlap_comm?"],
    ),
    "owned key in another section": (
        ["engine.deepspeed_config.stage=3"],
        ["zero_optimization.stage must be left out too: set it with engine.zero.stage"],
    ),
    "unknown section": (
        ["engine.deepspeed_config.zero.overlap_comm=true"],
        ["engine.deepspeed_config.zero is not a known key; did you mean zero_optimization?", "one of aio, zero_opt"],
    ),
    "value for a section": ([f"{ZERO}=true"], [f"{ZERO} is True: must be a section"]),
    "word for a number": (
        [f"{PASSED}stage3_prefetch_bucket_size=abc"],
        [f"{PASSED}stage3_prefetch_bucket_size is 'abc'", "valid integer"],
    ),
    "number out of range": ([f"{PASSED}reduce_bucket_size=0"], [f"{PASSED}reduce_bucket_size is 0", "greater than 0"]),
    "the Trainer's word": ([f"{PASSED}reduce_bucket_size=auto"], ["reduce_bucket_size is 'auto'", "must be a value"]),
    "word in aio": (["engine.deepspeed_config.aio.queue_depth=x"], ["aio.queue_depth is 'x'", "valid integer"]),
    "odd bucket": ([f"{PASSED}allgather_bucket_size=1001"], [f"{PASSED}allgather_bucket_size is 1001", "must be even"]),
    "direct storage without a device": (
        ["engine.deepspeed_config.aio.use_gds=true"], ["aio.use_gds is True: there is no CUDA device here", "false"],
    ),
    "dotted name as one key": (
        ["engine.deepspeed_config={{zero_optimization.overlap_comm: true}}"],
        ["'zero_optimization.overlap_comm' is one key", "must be nested, as in {zero_optimization: {overlap_comm: "],
    ),
    "layers without recomputation": (
        ["model.path={shared}/openai", "engine.recompute=full"],
        ["engine.recompute is 'full'", "no activation checkpointing for OpenAIGPTLMHeadModel", "none or selective"],
    ),
    "overlap at stage 1": (
        ["engine.zero.stage=1", f"{PASSED}overlap_comm=true"], [f"{PASSED}overlap_comm is True", "stage 1", "2 or 3"],
    ),
    # offload
    "device of its own": (
        ["engine.zero.offload_optimizer=true", f"{PASSED}offload_optimizer.device=cpu"],
        [f"{PASSED}offload_optimizer.device is 'cpu'", "set it with engine.zero.offload_optimizer"],
    ),
    "offload that is off": (
        [f"{PASSED}offload_optimizer.pin_memory=true"],
        [f"{PASSED}offload_optimizer is", "engine.zero.offload_optimizer is false"],
    ),
    "NVMe at stage 2": (
        ["engine.zero.offload_optimizer=true", f"{PASSED}offload_optimizer{NOWHERE}"],
        ["device is 'nvme'", "engine.zero.stage is 2"],
    ),
    "NVMe nowhere": (
        [*STAGE_3, "engine.zero.offload_optimizer=true", f"{PASSED}offload_optimizer.device=nvme"],
        [f"{PASSED}offload_optimizer.nvme_path is missing"],
    ),
    "NVMe that is not there": (
        [*STAGE_3, "engine.zero.offload_params=true", f"{PASSED}offload_param{NOWHERE}"],
        [f"{PASSED}offload_param.nvme_path is '/proc/none'", "existing directory"],
    ),
    # adapters
    "layer that is none": (
        ["lora={{rank: 2, alpha: 4, targets: [q_proj, c_attn]}}"],
        ["lora.targets.1 is 'c_attn'", "must be of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"],
    ),
    "model without such layers": (
        ["model.path={shared}/gpt2", "lora={{rank: 2, alpha: 4}}"],
        ["lora.targets.0 is 'q_proj'", "no linear layer that can have one"],
    ),
    "experts' layers": (
        ["model.path={shared}/mixed", "lora={{rank: 2, alpha: 4}}"],
        ["lora.targets.4 is 'gate_proj'", "must be of k_proj, o_proj, q_proj, v_proj"],
    ),
    # models that the tables lack
    "layer missing": (["model.path={shared}/lacking"], ["model.path: ", "transformer.h.1", "missing"]),
    "code of its own": (["model.path={shared}/own_code"], ["model.path: ", "'mine'", "without remote code"]),
    "the head": (["lora={{rank: 2, alpha: 4, targets: [lm_head]}}"], ["lora.targets.0 is 'lm_head'", "must be of"]),
}  # fmt: skip


def job(folder, shared, **changes):
    """A job of the DeepSpeed engine that is right."""
    model, data = {"path": str(shared / "model")}, {"path": str(shared / "data.jsonl")}
    return write_config(folder, **{"model": model, "data": data, "engine": {"name": "deepspeed"}, **changes})


def refused(config, overrides, tmp_path, capfd) -> str:
    """The one line that the command line prints for a job that leaves nothing but its status."""
    assert train(config, *overrides) == 2
    out, err = capfd.readouterr()
    told = [line for line in err.splitlines() if line.startswith("megalign")]
    assert out == "" and len(told) == 1 and err.splitlines() == told, err
    assert told[0].startswith("megalign: error: ")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["status.json"]
    assert status(tmp_path / "run")["code"] == 2
    return told[0]


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_code_2(name, shared, tmp_path, capfd):
    overrides, parts = CASES[name]
    overrides = [override.format(shared=shared) for override in overrides]
    line = refused(job(tmp_path, shared), overrides, tmp_path, capfd)
    assert [part for part in parts if part not in line] == [], line


@pytest.mark.parametrize(
    ("package", "changes", "parts"),
    [
        (
            "deepspeed",
            {},
            ["engine.name is 'deepspeed'", "missing; pip install -e .[deepspeed], or engine.name megatron"],
        ),
        ("peft", {"lora": {"rank": 2, "alpha": 4}}, ["lora is set", "peft is missing; pip install -e .[deepspeed]"]),
    ],
)
def test_package_that_is_not_installed(package, changes, parts, shared, tmp_path, capfd, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    line = refused(job(tmp_path, shared, **changes), [], tmp_path, capfd)
    assert [part for part in parts if part not in line] == [], line


LAYOUTS = [
    # model, overrides, ranks, parts of the line; none where the layout fits
    ("model", ["parallel.tensor=2"], 4, []),
    ("model", ["parallel.context=4"], 4, []),
    ("gpt2", ["parallel.tensor=3"], 3, ["transformers has no tensor-parallel plan for GPT2LMHeadModel", "data 3; "]),
    ("model", ["parallel.tensor=4"], 4, ["parallel.tensor is 4", "key-value heads 2", "tensor 2, data 2; "]),
    ("model", ["parallel.context=8"], 8, ["parallel.context is 8", "attention heads 4", "context 4, data 2"]),
    ("gpt2", ["parallel.tensor=4"], 4, ["parallel.tensor is 4", "heads 6", "values that fit this model: 1, 2, 3, 6"]),
    ("model", ["parallel.tensor=3"], 4, ["3 x 1 = 3: must divide the number of ranks 4, so be one of 1, 2, 4"]),
    (
        "model", ["parallel.tensor=2", "parallel.context=2"], 4,
        ["parallel.context is 2: parallel.tensor is 2", "nearest layouts of 4 ranks for this model: "],
    ),
    (
        "alibi", ["parallel.context=2"], 2,
        ["parallel.context is 2: must be 1 for this model, because its attention does not go", "data 2"],
    ),
    ("long", ["data.max_length=16"], 2, []),
    (
        "long", ["data.max_length=17"], 2,
        ["data.max_length is 17: must be at most 16 for this model", "depend on the other sequences of a row"],
    ),
    ("long", ["data.max_length=17", "parallel.tensor=2"], 2, []),
    ("mixed", ["parallel.tensor=2"], 2, ["parallel.tensor is 2: the model has experts", "engine.name megatron"]),
]  # fmt: skip


@pytest.mark.parametrize(("model", "overrides", "ranks", "parts"), LAYOUTS)
def test_layouts(model, overrides, ranks, parts, shared, tmp_path):
    cfg = load_config(str(job(tmp_path, shared)), overrides)
    problem = layout_problem(cfg, read_model(shared / model), ranks, trained=True)
    assert (problem is None) == (parts == [])
    assert [part for part in parts if part not in (problem or "")] == [], problem
