"""Converts Llama 1 to 3.x, and other models saved under its architecture."""

from megalign.convert.families.parts import (
    ATTENTION,
    FIRST,
    LAST,
    MLP,
    MLP_BIAS,
    NORMS,
    OUT_BIAS,
    QKV_BIAS,
    ROTARY_BUFFER,
)
from megalign.convert.rules import Family, register

LLAMA = register(
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        rules=FIRST + NORMS + ATTENTION + QKV_BIAS + OUT_BIAS + MLP + MLP_BIAS + LAST,
        switches={"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        defaults={"max_position_embeddings": 2048},
        ignorable=(ROTARY_BUFFER,),
    )
)
