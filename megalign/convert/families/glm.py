"""Converts GLM-4: half of each head is rotated, interleaved; from GLM-4-0414 on (`glm4`) with four norms a layer."""

from dataclasses import replace

from megalign.convert.families.parts import ATTENTION, FIRST, FUSED_MLP, LAST, NORMS, QKV_BIAS, norm
from megalign.convert.hf.config_json import ConfigFile
from megalign.convert.hf.rope import read_rope, rope_section
from megalign.convert.rules import Family, register
from megalign.model_config import ModelConfig, Rope


def rope(hf: ConfigFile, head_dim: int) -> Rope:
    """Read the rotary parameters: partial and interleaved."""
    return read_rope(hf, rope_section(hf), head_dim=head_dim, interleaved=True, partial=True)


def details(hf: ConfigFile, model: ModelConfig) -> ModelConfig:
    """Add glm4's norms on the outputs of attention and MLP."""
    return replace(model, post_norm=True)


RULES = FIRST + NORMS + ATTENTION + QKV_BIAS + FUSED_MLP + LAST
DEFAULTS = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}
GLM = register(
    Family(
        name="glm",
        architecture="GlmForCausalLM",
        rules=RULES,
        switches={"qkv_bias": "attention_bias"},
        defaults=DEFAULTS,
        rope=rope,
    )
)
GLM4 = register(
    Family(
        name="glm4",
        architecture="Glm4ForCausalLM",
        rules=(
            *RULES,
            norm("self_attention.post_norm", "post_self_attn_layernorm"),
            norm("mlp.post_norm", "post_mlp_layernorm"),
        ),
        switches={"qkv_bias": "attention_bias"},
        defaults=DEFAULTS,
        rope=rope,
        details=details,
    )
)
