"""Converts gpt-oss: attention sinks, a sliding window on every other layer, stacked experts with clamped SwiGLU."""

from dataclasses import replace

from megalign.convert.families.parts import ATTENTION, FIRST, LAST, NORMS, OUT_BIAS, QKV_BIAS, moe_config, windows
from megalign.convert.hf.config_json import ConfigFile
from megalign.convert.hf.rope import read_rope, rope_section
from megalign.convert.rules import HF, LAYER, STACK2, Family, Piece, Rule, Window, register
from megalign.model_config import ModelConfig, MoeConfig, Rope

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0


def window(hf: ConfigFile) -> Window:
    """Return the sliding window: on even layers, unless `layer_types` says otherwise."""
    return windows(hf, lambda layer: layer % 2 == 0)


def rope(hf: ConfigFile, head_dim: int) -> Rope:
    """Read the rotary parameters; null or absent means the published YaRN settings."""
    written = {key: value for key, value in hf.fields.items() if key != "rope_parameters" or value is not None}
    hf = ConfigFile(hf.path, written, hf.defaults)
    return read_rope(hf, rope_section(hf), head_dim=head_dim)


def moe(hf: ConfigFile) -> MoeConfig:
    """Read the experts' configuration; `intermediate_size` is the size of one expert."""
    for key, value in (("swiglu_alpha", SWIGLU_ALPHA), ("swiglu_limit", SWIGLU_LIMIT)):
        if hf.value(key) != value:
            hf.refuse(key, f"must be {value}")
    return replace(moe_config(hf, ffn="intermediate_size", normalize=True), bias=True)


def details(hf: ConfigFile, model: ModelConfig) -> ModelConfig:
    """Add attention sinks, and norms in fp32."""
    return replace(model, sinks=True, norm_fp32=True)


EXPERT = f"{LAYER}.mlp.experts.local_experts.{{e}}"
EXPERTS = (
    Rule(f"{LAYER}.mlp.router.weight", (Piece(f"{HF}.mlp.router.weight", ("experts", "hidden")),)),
    Rule(f"{LAYER}.mlp.router.bias", (Piece(f"{HF}.mlp.router.bias", ("experts",)),)),
    Rule(
        f"{EXPERT}.linear_fc1.weight",
        tuple(
            Piece(
                f"{HF}.mlp.experts.gate_up_proj",
                ("expert_ffn", "hidden"),
                block=block,
                every=2,
                of_experts=True,
                transposed=True,
            )
            for block in range(2)
        ),
        layout=STACK2,
    ),
    Rule(
        f"{EXPERT}.linear_fc1.bias",
        tuple(
            Piece(f"{HF}.mlp.experts.gate_up_proj_bias", ("expert_ffn",), block=block, every=2, of_experts=True)
            for block in range(2)
        ),
        layout=STACK2,
    ),
    Rule(
        f"{EXPERT}.linear_fc2.weight",
        (Piece(f"{HF}.mlp.experts.down_proj", ("hidden", "expert_ffn"), of_experts=True, transposed=True),),
    ),
    Rule(f"{EXPERT}.linear_fc2.bias", (Piece(f"{HF}.mlp.experts.down_proj_bias", ("hidden",), of_experts=True),)),
)
SINKS = Rule(f"{LAYER}.self_attention.sinks", (Piece(f"{HF}.self_attn.sinks", ("heads",)),), tp_dim=0)

GPT_OSS = register(
    Family(
        name="gpt_oss",
        architecture="GptOssForCausalLM",
        rules=(*FIRST, *NORMS, *ATTENTION, *QKV_BIAS, *OUT_BIAS, SINKS, *EXPERTS, *LAST),
        switches={"qkv_bias": "attention_bias", "out_bias": "attention_bias"},
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
            "sliding_window": 128,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_alpha": SWIGLU_ALPHA,
            "swiglu_limit": SWIGLU_LIMIT,
            "rope_theta": 150000.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        window=window,
        rope=rope,
        moe=moe,
        details=details,
        activation="clamped_swiglu",
    )
)
