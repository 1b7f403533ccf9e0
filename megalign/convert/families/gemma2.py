"""Gemma 2: four norms whose weights are offsets from one, soft caps, a window on every other layer."""

from dataclasses import replace

from megalign.convert.config_file import ConfigFile
from megalign.convert.families.parts import ATTENTION, FIRST, FOUR_NORMS, LAST, MLP, OUT_BIAS, QKV_BIAS, windows
from megalign.convert.model_config import ModelConfig
from megalign.convert.rules import Family, Window, register


def window(config: ConfigFile) -> Window:
    """Even layers slide, where `layer_types` says nothing else."""
    return windows(config, lambda layer: layer % 2 == 0)


def details(config: ConfigFile, cfg: ModelConfig) -> ModelConfig:
    """What Gemma 2 and 3 have in common."""
    if config.value("use_bidirectional_attention"):
        config.refuse("use_bidirectional_attention", "allowed: false (a policy is causal)")
    attention_cap, logit_cap = (
        None if config.value(key) is None else config.number(key)
        for key in ("attn_logit_softcapping", "final_logit_softcapping")
    )
    return replace(
        cfg,
        post_norm=True,
        norm_offset=1.0,
        norm_fp32=True,
        embedding_scale=cfg.hidden_size**0.5,
        attention_scale=config.number("query_pre_attn_scalar") ** -0.5,
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
