"""config.json is read as transformers reads it, and refused where the model would differ."""

import json
import math

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megalign.convert import read_model_config
from megalign.convert.hf.config import noise_left_out
from megalign.convert.hf.config_json import read_json
from megalign.model_config import LinearScaling, Llama3Scaling, LongScaling, YarnScaling
from megalign.models import rope
from megalign.schema import UserError
from tests.support.tiny_checkpoints import CASES, LLAMA3_ROPE, SIZES

MINIMAL = {
    "hidden_size": 512,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 64,
    "vocab_size": 131,
}
ARCHITECTURES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2Moe",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
}


def read(folder, **fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return read_model_config(folder)


def llama(**changes):
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES, **changes}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_absent_fields_have_the_defaults_of_transformers(tmp_path, model_type):
    cfg = read(tmp_path, architectures=[f"{ARCHITECTURES[model_type]}ForCausalLM"], model_type=model_type, **MINIMAL)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert cfg.num_kv_heads == theirs.num_key_value_heads
    assert cfg.head_dim == (getattr(theirs, "head_dim", None) or 8)
    assert cfg.max_positions == theirs.max_position_embeddings
    assert cfg.norm_eps == theirs.rms_norm_eps
    assert cfg.rope.theta == theirs.rope_parameters["rope_theta"]
    assert cfg.rope.scaling is None and theirs.rope_parameters["rope_type"] == "default"
    assert cfg.tied == theirs.tie_word_embeddings
    assert cfg.sliding_window == (getattr(theirs, "sliding_window", None) or None)
    assert (cfg.moe is None) == (not hasattr(theirs, "num_experts_per_tok"))
    if cfg.moe is not None:
        assert (cfg.moe.num_experts, cfg.moe.top_k) == (theirs.num_experts, theirs.num_experts_per_tok)
        assert cfg.moe.ffn_size == getattr(theirs, "moe_intermediate_size", 64)
        assert cfg.moe.normalize == getattr(theirs, "norm_topk_prob", True)
        assert cfg.moe.shared_ffn_size == getattr(theirs, "shared_expert_intermediate_size", 0)
        assert cfg.moe.dense_layers == ()
    assert cfg.qkv_bias == (model_type == "qwen2" or getattr(theirs, "qkv_bias", False))


@pytest.mark.parametrize("case", CASES)
def test_what_transformers_saved(checkpoints, case):
    cfg = read_model_config(checkpoints(case))
    model_type, _, tied, fields = CASES[case]
    assert (cfg.family, cfg.tied) == (model_type, tied)
    assert (cfg.num_layers, cfg.hidden_size, cfg.ffn_size, cfg.num_heads, cfg.num_kv_heads) == (2, 24, 40, 6, 2)
    assert (cfg.vocab_size, cfg.padded_vocab_size, cfg.max_positions) == (131, 256, 64)
    assert cfg.head_dim == fields.get("head_dim", 4)
    assert cfg.sliding_window == fields.get("sliding_window")
    assert cfg.qk_norm == ("head" if model_type == "qwen3" else None)
    assert cfg.qkv_bias == (model_type == "qwen2" or fields.get("attention_bias", False))
    assert cfg.out_bias == fields.get("attention_bias", False)
    assert cfg.mlp_bias == fields.get("mlp_bias", False)
    assert cfg.rope.theta == (500000.0 if "rope_parameters" in fields else 5000.0)
    assert cfg.rope.scaling == (Llama3Scaling(8.0, 1.0, 4.0, 32) if "rope_parameters" in fields else None)


def test_rope_of_older_checkpoints(tmp_path):
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    old = {**llama(rope_theta=500000.0, rope_scaling=scaling)}
    del old["rope_parameters"]
    assert read(tmp_path, **old) == read(tmp_path, **llama(rope_parameters=LLAMA3_ROPE))
    del scaling["original_max_position_embeddings"]
    assert read(tmp_path, **old).rope.scaling == Llama3Scaling(8.0, 1.0, 4.0, 64)
    assert read(tmp_path, **{**old, "rope_scaling": None}).rope.scaling is None
    assert read(tmp_path, **{**old, "rope_scaling": {"type": "default"}}).rope.theta == 500000.0


def test_windows_of_qwen(tmp_path):
    def window(**fields):
        return read(tmp_path, architectures=["Qwen2ForCausalLM"], model_type="qwen2", **SIZES, **fields).sliding_window

    assert window(use_sliding_window=False, sliding_window=8) is None
    assert window(use_sliding_window=True, sliding_window=8, max_window_layers=0) == 8
    assert window(use_sliding_window=True, sliding_window=8, max_window_layers=2) is None
    assert window(use_sliding_window=True, sliding_window=None, max_window_layers=0) is None
    assert window(use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention"] * 2) == 8
    mixed = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    cfg = read(tmp_path, architectures=["Qwen2ForCausalLM"], model_type="qwen2", **SIZES, **mixed)
    assert [cfg.window(layer) for layer in range(2)] == [None, 8]


def test_kinds_of_scaling(tmp_path):
    def scaling(**fields):
        return read(tmp_path, **llama(rope_parameters={"rope_theta": 100.0, **fields})).rope.scaling

    assert scaling(rope_type="linear", factor=2.0) == LinearScaling(2.0)
    # 0.1 ln 4 + 1; with both weights given their quotient: (0.1 x 2 ln 4 + 1) / (0.1 ln 4 + 1)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert scaling(**yarn) == YarnScaling(4.0, 16, attention_factor=pytest.approx(1.1386294))
    both = scaling(**yarn, mscale=2.0, mscale_all_dim=1.0, beta_fast=8, truncate=False)
    assert both == YarnScaling(4.0, 16, 8.0, 1.0, truncate=False, attention_factor=pytest.approx(1.2772589 / 1.1386294))
    assert scaling(**yarn, attention_factor=0.5).attention_factor == 0.5
    # 64 positions for 16 are a factor of 4; sqrt(1 + ln 4 / ln 16) is sqrt(1.5)
    long = {"rope_type": "longrope", "short_factor": [1, 2], "long_factor": [3, 4]}
    found = scaling(**long, original_max_position_embeddings=16)
    assert found == LongScaling((1.0, 2.0), (3.0, 4.0), 16, pytest.approx(1.5**0.5))


REFUSED = {
    "architectures is ['GemmaForCausalLM']; must be one of Deepseek": {"architectures": ["GemmaForCausalLM"]},
    "architectures is ['LlamaForSequenceClassification']; must be one of": {
        "architectures": ["LlamaForSequenceClassification"]
    },
    "model_type is 'gpt2'; must be one of deepseek_v2, deepseek_v3, gemma2, gemma3_text, glm, glm4, gpt_oss": {
        "architectures": None,
        "model_type": "gpt2",
    },
    "model_type is 'mistral'; LlamaForCausalLM has 'llama'": {"model_type": "mistral"},
    "hidden_act is 'gelu'; must be silu or gelu_pytorch_tanh": {"hidden_act": "gelu"},
    "quantization_config.quant_method is 'gptq'; must be fp8": {"quantization_config": {"quant_method": "gptq"}},
    "quantization_config.weight_block_size is [128]; must be rows and columns": {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}
    },
    "rope_parameters.rope_type is 'dynamic'; must be one of default, linear, llama3, longrope, yarn": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}
    },
    "rope_scaling.factor is missing; must be a number": {"rope_scaling": {"type": "linear"}},
    "rope_parameters.short_factor is [1.0]; must be a list of 2 numbers > 0": {
        "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 1.0]}
    },
    "rope_parameters.factor is missing; must be a number": {"rope_parameters": {"rope_type": "llama3"}},
    "rope_parameters.high_freq_factor is 1.0; must be above": {
        "rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 1.0}
    },
    "partial_rotary_factor is 0.5; must be 1.0": {"partial_rotary_factor": 0.5},
    "rope_parameters is {'full_attention': {'rope_theta': 1.0}}; parameters by layer": {
        "rope_parameters": {"full_attention": {"rope_theta": 1.0}}
    },
    "rope_parameters is 'big'; must be an object": {"rope_parameters": "big"},
    "num_key_value_heads is 4; must divide num_attention_heads, 6": {"num_key_value_heads": 4},
    "num_attention_heads is 7; must divide hidden_size, 24": {"num_attention_heads": 7, "num_key_value_heads": 7},
    "5 of head_dim 5 dimensions rotate": {"head_dim": 5},
    "hidden_size is 24.0; must be a whole number >= 1": {"hidden_size": 24.0},
    "vocab_size is -1; must be a whole number >= 1": {"vocab_size": -1},
    "num_hidden_layers is missing": {"num_hidden_layers": None},
    "rms_norm_eps is True; must be a number > 0": {"rms_norm_eps": True},
    "tie_word_embeddings is 'no'; must be true or false": {"tie_word_embeddings": "no"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(tmp_path, message):
    with pytest.raises(UserError) as error:
        read(tmp_path, **llama(**REFUSED[message]))
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: {message}")
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="config.json is missing"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not readable JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json holds list; must be a JSON object"):
        read_model_config(tmp_path)


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "attention_factor": None}


def of(model_type, **changes):
    """A small config.json of a family that has layers of several types."""
    architecture = {"olmo3": "Olmo3", "gemma3_text": "Gemma3", "gpt_oss": "GptOss", "smollm3": "SmolLM3"}[model_type]
    fields = {key: value for key, value in SIZES.items() if key != "rope_parameters"} | {"head_dim": 8}
    fields |= {"num_local_experts": 4, "num_experts_per_tok": 2} if model_type == "gpt_oss" else {}
    return {"architectures": [f"{architecture}ForCausalLM"], "model_type": model_type, **fields, **changes}


@pytest.mark.parametrize("model_type", ["olmo3", "gemma3_text"])
def test_older_scaling_is_of_full_layers_alone(tmp_path, model_type):
    written = of(model_type, rope_scaling=YARN, original_max_position_embeddings=16, layer_types=["full_attention"] * 2)
    cfg = read(tmp_path, **written)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, None, layer_type="full_attention")
    assert torch.allclose(rope.frequencies(cfg.rope), frequencies, rtol=1e-6)
    assert cfg.rope.scaling.attention_factor == pytest.approx(factor) and factor > 1.2
    assert cfg.sliding_rope.scaling is None


REFUSED_BY_TYPE = {
    "rope_parameters is {'rope_type': 'default', 'rope_theta': 1.0}; must be full_attention and sliding": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1.0}
    },
    "rope_scaling is {'rope_type': 'yarn'": {
        "rope_parameters": {"full_attention": {"rope_type": "default"}},
        "rope_scaling": YARN,
    },
    "rope_parameters.full_attention.truncate is False; must be true": {
        "rope_parameters": {"full_attention": {**YARN, "truncate": False}}
    },
}


@pytest.mark.parametrize("model_type", ["olmo3", "gemma3_text"])
@pytest.mark.parametrize("message", REFUSED_BY_TYPE)
def test_refusals_of_positions_by_layer_type(tmp_path, model_type, message):
    with pytest.raises(UserError) as error:
        read(tmp_path, **of(model_type, **REFUSED_BY_TYPE[message]))
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: {message}")


def test_nulls_of_gpt_oss_are_defaults(tmp_path):
    plain = read(tmp_path, **of("gpt_oss"))
    assert plain.rope.scaling == YarnScaling(32.0, 4096, truncate=False, attention_factor=0.1 * math.log(32) + 1)
    assert read(tmp_path, **of("gpt_oss", rope_parameters=None)) == plain
    assert read(tmp_path, **of("gpt_oss", rope_scaling=None)) == plain


def test_windows_that_are_switched_off_and_listed(tmp_path):
    listed = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    assert read(tmp_path, **of("smollm3", use_sliding_window=True, **listed)).full_layers == (1,)
    with pytest.raises(UserError, match="use_sliding_window is False; must be true, for layer_types has sliding"):
        read(tmp_path, **of("smollm3", use_sliding_window=False, **listed))


def test_mistral_with_layer_types_is_ministral(tmp_path):
    mistral = {**llama(), "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4}
    kinds = ["full_attention", "sliding_attention"]
    for layer_types, expected in ((None, (4, ())), (kinds, (4, (0,))), (["full_attention"] * 2, (None, ()))):
        cfg = read(tmp_path, **mistral, layer_types=layer_types)
        assert (cfg.sliding_window, cfg.full_layers) == expected
    named = {"architectures": ["MinistralForCausalLM"], "model_type": "ministral", "layer_types": kinds}
    cfg = read(tmp_path, **{**mistral, **named})
    assert (cfg.family, cfg.sliding_window, cfg.full_layers) == ("ministral", 4, (0,))


def test_noise_of_training_is_never_applied(tmp_path):
    plain = read(tmp_path, **llama(attention_dropout=0.0))
    assert noise_left_out(read_json(tmp_path / "config.json")) == ""
    assert read(tmp_path, **llama(attention_dropout=0.1, embd_pdrop=0.2)) == plain
    told = noise_left_out(read_json(tmp_path / "config.json"))
    assert told == "not applied, though config.json asks for it: attention_dropout 0.1, embd_pdrop 0.2"
