"""Converts Phi-3 and Phi-4: fused query, key and value, fused gate and up; LongRoPE for long contexts."""

from megalign.convert.families.parts import FIRST, FUSED_ATTENTION, FUSED_MLP, LAST, NORMS
from megalign.convert.hf.config_json import ConfigFile
from megalign.convert.hf.rope import read_rope, rope_section
from megalign.convert.rules import Family, Window, register
from megalign.model_config import Rope


def window(hf: ConfigFile) -> Window:
    """Return the sliding window of all layers."""
    return (None if hf.value("sliding_window") is None else hf.whole("sliding_window")), ()


def rope(hf: ConfigFile, head_dim: int) -> Rope:
    """Read the rotary parameters; partial in Phi-4-mini."""
    return read_rope(hf, rope_section(hf), head_dim=head_dim, partial=True)


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
