"""OLMo 3: as OLMo 2, with a window on three of four layers, which keep plain positions where others are scaled."""

from dataclasses import replace

from megalign.convert.config_file import ConfigFile
from megalign.convert.families import olmo2
from megalign.convert.families.parts import rope_by_kind, windows
from megalign.convert.model_config import ModelConfig, Rope
from megalign.convert.rules import Family, Window, register


def window(config: ConfigFile) -> Window:
    """All but every fourth layer slide, where `layer_types` says nothing else."""
    return windows(config, lambda layer: (layer + 1) % 4 != 0)


def rope(config: ConfigFile, head_dim: int) -> Rope:
    """The positions of layers that see everything."""
    return rope_by_kind(config, "full_attention", head_dim)


def details(config: ConfigFile, cfg: ModelConfig) -> ModelConfig:
    """OLMo 2's, and the positions of sliding layers, whose base transformers does not take from `rope_theta`."""
    local = rope_by_kind(config, "sliding_attention", cfg.head_dim, theta_key="rope_local_base_freq")
    return replace(olmo2.details(config, cfg), sliding_rope=local)


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
