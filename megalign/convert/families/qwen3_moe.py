"""Converts Qwen3-MoE: query and key norms per head, no shared expert."""

from dataclasses import replace

from megalign.convert.families.parts import (
    ATTENTION,
    FIRST,
    LAST,
    MLP,
    NORMS,
    OUT_BIAS,
    QK_NORM,
    QKV_BIAS,
    ROTARY_BUFFER,
    dense_layers,
    experts,
    moe_config,
)
from megalign.convert.hf.config_json import ConfigFile
from megalign.convert.rules import Family, Window, register
from megalign.model_config import MoeConfig


def window(hf: ConfigFile) -> Window:
    """Return the sliding window of all layers; unlike dense Qwen3's, it does not start at `max_window_layers`."""
    if not hf.flag("use_sliding_window") or hf.value("sliding_window") is None:
        return None, ()
    return hf.whole("sliding_window"), ()


def moe(hf: ConfigFile) -> MoeConfig:
    """Read the experts' configuration and the dense layers."""
    config = moe_config(hf, ffn="moe_intermediate_size", normalize=hf.flag("norm_topk_prob"))
    return replace(config, dense_layers=dense_layers(hf))


QWEN3_MOE = register(
    Family(
        name="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        rules=FIRST + NORMS + ATTENTION + QKV_BIAS + OUT_BIAS + QK_NORM + MLP + experts("mlp") + LAST,
        switches={"qkv_bias": "attention_bias", "out_bias": "attention_bias", "qk_norm": True},
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "decoder_sparse_step": 1,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        window=window,
        moe=moe,
        ignorable=(ROTARY_BUFFER,),
    )
)
