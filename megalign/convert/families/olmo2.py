"""Converts OLMo 2: norms after attention and MLP instead of before; query and key norms over all heads."""

from dataclasses import replace

from megalign.convert.families.parts import ATTENTION, FIRST, LAST, MLP, OUT_BIAS, QKV_BIAS, norm
from megalign.convert.hf.config_json import ConfigFile
from megalign.convert.rules import HF, LAYER, Family, Piece, Rule, register
from megalign.model_config import ModelConfig


def details(hf: ConfigFile, model: ModelConfig) -> ModelConfig:
    """Add the positions of the norms, and what is computed in fp32."""
    return replace(model, pre_norm=False, post_norm=True, norm_fp32=True, rope_fp32=True, qk_norm="all")


OLMO2 = register(
    Family(
        name="olmo2",
        architecture="Olmo2ForCausalLM",
        rules=(
            *FIRST,
            *ATTENTION,
            *QKV_BIAS,
            *OUT_BIAS,
            Rule(
                f"{LAYER}.self_attention.query_norm.weight",
                (Piece(f"{HF}.self_attn.q_norm.weight", ("query",)),),
                tp_dim=0,
            ),
            Rule(
                f"{LAYER}.self_attention.key_norm.weight",
                (Piece(f"{HF}.self_attn.k_norm.weight", ("key_value",)),),
                tp_dim=0,
            ),
            norm("self_attention.post_norm", "post_attention_layernorm"),
            *MLP,
            norm("mlp.post_norm", "post_feedforward_layernorm"),
            *LAST,
        ),
        switches={"qkv_bias": "attention_bias", "out_bias": "attention_bias"},
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
        details=details,
    )
)
