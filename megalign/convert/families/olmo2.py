"""OLMo 2: norms on what attention and MLP give, none before them; queries and keys normalised over all heads."""

from dataclasses import replace

from megalign.convert.config_file import ConfigFile
from megalign.convert.families.parts import ATTENTION, FIRST, LAST, MLP, OUT_BIAS, QKV_BIAS, norm
from megalign.convert.model_config import ModelConfig
from megalign.convert.rules import HF, LAYER, Family, Piece, Rule, register


def details(config: ConfigFile, cfg: ModelConfig) -> ModelConfig:
    """Where the norms are."""
    return replace(cfg, pre_norm=False, post_norm=True, norm_fp32=True, rope_fp32=True, qk_norm="all")


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
