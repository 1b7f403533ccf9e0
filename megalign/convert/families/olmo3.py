"""Converts OLMo 3: OLMo 2 with a sliding window on three of four layers, where rotary scaling does not apply."""

from dataclasses import replace

from megalign.convert.families import olmo2
from megalign.convert.families.parts import rope_by_kind, windows
from megalign.convert.hf.config_json import ConfigFile
from megalign.convert.rules import Family, Window, register
from megalign.model_config import ModelConfig, Rope


def window(hf: ConfigFile) -> Window:
    """Return the sliding window: on all but every fourth layer, unless `layer_types` says otherwise."""
    return windows(hf, lambda layer: (layer + 1) % 4 != 0)


def rope(hf: ConfigFile, head_dim: int) -> Rope:
    """Read the rotary parameters of full-attention layers."""
    return rope_by_kind(hf, "full_attention", head_dim)


def details(hf: ConfigFile, model: ModelConfig) -> ModelConfig:
    """Add OLMo 2's details, and the rotary parameters of sliding layers: transformers ignores `rope_theta` for them."""
    local = rope_by_kind(hf, "sliding_attention", model.head_dim, theta_key="rope_local_base_freq")
    return replace(olmo2.details(hf, model), sliding_rope=local)


OLMO3 = register(
    Family(
        name="olmo3",
        architecture="Olmo3ForCausalLM",
        rules=olmo2.OLMO2.rules,
        switches=olmo2.OLMO2.switches,
        defaults={
            **olmo2.OLMO2.defaults,
            "sliding_window": 4096,
            "rope_theta": 500000.0,
            "rope_local_base_freq": 500000.0,
        },
        window=window,
        rope=rope,
        details=details,
    )
)
