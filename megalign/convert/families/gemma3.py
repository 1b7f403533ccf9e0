"""Converts text-only Gemma 3: Gemma 2 with query and key norms; sliding layers have their own rotary parameters."""

from dataclasses import replace

from megalign.convert.families import gemma2
from megalign.convert.families.parts import QK_NORM, rope_by_kind, windows
from megalign.convert.hf.config_json import ConfigFile
from megalign.convert.rules import Family, Window, register
from megalign.model_config import ModelConfig, Rope


def window(hf: ConfigFile) -> Window:
    """Return the sliding window: by `layer_types`, else on all but every `sliding_window_pattern`-th layer."""
    pattern = hf.whole("sliding_window_pattern")
    return windows(hf, lambda layer: (layer + 1) % pattern != 0)


def rope(hf: ConfigFile, head_dim: int) -> Rope:
    """Read the rotary parameters of full-attention layers."""
    return rope_by_kind(hf, "full_attention", head_dim)


def details(hf: ConfigFile, model: ModelConfig) -> ModelConfig:
    """Add Gemma 2's details, and the rotary parameters of sliding layers."""
    local = rope_by_kind(hf, "sliding_attention", model.head_dim, theta_key="rope_local_base_freq")
    return replace(gemma2.details(hf, model), sliding_rope=local)


GEMMA3 = register(
    Family(
        name="gemma3_text",
        architecture="Gemma3ForCausalLM",
        rules=gemma2.GEMMA2.rules + QK_NORM,
        switches={**gemma2.GEMMA2.switches, "qk_norm": True},
        defaults={
            **gemma2.GEMMA2.defaults,
            "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "sliding_window_pattern": 6,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        window=window,
        rope=rope,
        details=details,
        activation="hidden_activation",
    )
)
