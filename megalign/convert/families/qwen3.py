"""Converts dense Qwen3: query and key norms per head, head_dim independent of the hidden size."""

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
    window_by_switch,
)
from megalign.convert.rules import Family, register

QWEN3 = register(
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        rules=FIRST + NORMS + ATTENTION + QKV_BIAS + OUT_BIAS + QK_NORM + MLP + LAST,
        switches={"qkv_bias": "attention_bias", "out_bias": "attention_bias", "qk_norm": True},
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        window=window_by_switch,
        ignorable=(ROTARY_BUFFER,),
    )
)
