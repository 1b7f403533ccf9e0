"""Qwen3-MoE: queries and keys normalised by head, no shared expert."""

from dataclasses import replace

from megalign.convert.config_file import ConfigFile
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
from megalign.convert.model_config import MoeConfig
from megalign.convert.rules import Family, Window, register


def window(config: ConfigFile) -> Window:
    """The window of all layers: unlike Qwen3's, it does not begin at `max_window_layers`."""
    if not config.flag("use_sliding_window") or config.value("sliding_window") is None:
        return None, ()
    return config.whole("sliding_window"), ()


def moe(config: ConfigFile) -> MoeConfig:
    """The experts of layers that have them."""
    found = moe_config(config, ffn="moe_intermediate_size", normalize=config.flag("norm_topk_prob"))
    return replace(found, dense_layers=dense_layers(config))


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
