"""Converts Gemma 2: four norms that multiply by 1 + weight, soft caps, a sliding window on every other layer."""

from dataclasses import replace

from megalign.convert.families.parts import ATTENTION, FIRST, FOUR_NORMS, LAST, MLP, OUT_BIAS, QKV_BIAS, windows
from megalign.convert.hf.config_json import ConfigFile
from megalign.convert.rules import Family, Window, register
from megalign.model_config import ModelConfig


def window(hf: ConfigFile) -> Window:
    """Return the sliding window: on even layers, unless `layer_types` says otherwise."""
    return windows(hf, lambda layer: layer % 2 == 0)


def details(hf: ConfigFile, model: ModelConfig) -> ModelConfig:
    """Add the norms, scales and soft caps that Gemma 2 and 3 have in common."""
    if hf.value("use_bidirectional_attention"):
        hf.refuse("use_bidirectional_attention", "must be false (a policy is causal)")
    attention_cap, logit_cap = (
        None if hf.value(key) is None else hf.number(key)
        for key in ("attn_logit_softcapping", "final_logit_softcapping")
    )
    return replace(
        model,
        post_norm=True,
        norm_offset=1.0,
        norm_fp32=True,
        embedding_scale=model.hidden_size**0.5,
        attention_scale=hf.number("query_pre_attn_scalar") ** -0.5,
        attention_softcap=attention_cap,
        logit_softcap=logit_cap,
    )


GEMMA2 = register(
    Family(
        name="gemma2",
        architecture="Gemma2ForCausalLM",
        rules=FIRST + FOUR_NORMS + ATTENTION + QKV_BIAS + OUT_BIAS + MLP + LAST,
        switches={"qkv_bias": "attention_bias", "out_bias": "attention_bias"},
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        window=window,
        details=details,
        activation="hidden_activation",
    )
)
