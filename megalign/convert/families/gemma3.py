"""Gemma 3, text alone: Gemma 2 with queries and keys normalised, and sliding layers with positions of their own."""

from dataclasses import replace

from megalign.convert.config_file import ConfigFile
from megalign.convert.families import gemma2
from megalign.convert.families.parts import QK_NORM, rope_by_kind, windows
from megalign.convert.model_config import ModelConfig, Rope
from megalign.convert.rules import Family, Window, register


def window(config: ConfigFile) -> Window:
    """All but every `sliding_window_pattern`-th layer slide, where `layer_types` says nothing else."""
    pattern = config.whole("sliding_window_pattern")
    return windows(config, lambda layer: (layer + 1) % pattern != 0)


def rope(config: ConfigFile, head_dim: int) -> Rope:
    """The positions of layers that see everything."""
    return rope_by_kind(config, "full_attention", head_dim)


def details(config: ConfigFile, cfg: ModelConfig) -> ModelConfig:
    """Gemma 2's, and the positions of sliding layers."""
    local = rope_by_kind(config, "sliding_attention", cfg.head_dim, theta_key="rope_local_base_freq")
    return replace(gemma2.details(config, cfg), sliding_rope=local)


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
