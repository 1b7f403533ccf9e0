"""Converts Qwen2 and Qwen2.5: biases on query, key and value only."""

from megalign.convert.families.parts import (
    ATTENTION,
    FIRST,
    LAST,
    MLP,
    NORMS,
    QKV_BIAS,
    ROTARY_BUFFER,
    window_by_switch,
)
from megalign.convert.rules import Family, register

QWEN2 = register(
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        rules=FIRST + NORMS + ATTENTION + QKV_BIAS + MLP + LAST,
        switches={"qkv_bias": True},
        defaults={
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        window=window_by_switch,
        ignorable=(ROTARY_BUFFER,),
    )
)
