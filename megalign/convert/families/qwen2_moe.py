"""Converts Qwen1.5-MoE and Qwen2-MoE: a shared expert with a sigmoid gate; biases on query, key and value."""

from dataclasses import replace
from functools import partial

from megalign.convert.families.parts import (
    ATTENTION,
    FIRST,
    LAST,
    MLP,
    NORMS,
    QKV_BIAS,
    ROTARY_BUFFER,
    SHARED_EXPERT,
    dense_layers,
    experts,
    moe_config,
    window_by_switch,
)
from megalign.convert.hf.config_json import ConfigFile
from megalign.convert.rules import Family, register
from megalign.model_config import MoeConfig


def moe(hf: ConfigFile) -> MoeConfig:
    """Read the configuration of the routed and the shared experts."""
    config = moe_config(hf, ffn="moe_intermediate_size", normalize=hf.flag("norm_topk_prob"))
    shared = hf.whole("shared_expert_intermediate_size")
    return replace(config, shared_ffn_size=shared, shared_gate=True, dense_layers=dense_layers(hf))


QWEN2_MOE = register(
    Family(
        name="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        rules=FIRST + NORMS + ATTENTION + QKV_BIAS + MLP + experts("mlp") + SHARED_EXPERT + LAST,
        switches={"qkv_bias": "qkv_bias"},
        defaults={
            "num_key_value_heads": 16,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "qkv_bias": True,
            "decoder_sparse_step": 1,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        window=partial(window_by_switch, slides=lambda layer, bound: layer % 2 == 0 and layer < bound),
        moe=moe,
        ignorable=(ROTARY_BUFFER,),
    )
)
