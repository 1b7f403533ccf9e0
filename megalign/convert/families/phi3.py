"""Phi-3 and Phi-4: one matrix for query, key and value, one for gate and up; long contexts by LongRoPE."""

from megalign.convert.config_file import ConfigFile
from megalign.convert.families.parts import FIRST, FUSED_ATTENTION, FUSED_MLP, LAST, NORMS
from megalign.convert.model_config import Rope
from megalign.convert.rope_config import read_rope, rope_section
from megalign.convert.rules import Family, Window, register


def window(config: ConfigFile) -> Window:
    """The window of all layers."""
    return (None if config.value("sliding_window") is None else config.whole("sliding_window")), ()


def rope(config: ConfigFile, head_dim: int) -> Rope:
    """Partial in Phi-4-mini."""
    return read_rope(config, rope_section(config), head_dim=head_dim, partial=True)


PHI3 = register(
    Family(
        name="phi3",
        architecture="Phi3ForCausalLM",
        rules=FIRST + NORMS + FUSED_ATTENTION + FUSED_MLP + LAST,
        switches={},
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
        window=window,
        rope=rope,
    )
)
