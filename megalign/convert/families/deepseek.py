"""Converts DeepSeek-V2 and -V3: latent attention (MLA), shared experts, and group-limited routing.

V3's MTP (multi-token prediction) layers (`num_nextn_predict_layers`) are not read, as in transformers.
"""

from dataclasses import replace
from operator import attrgetter

import torch

from megalign.convert.families.parts import FIRST, LAST, MLP, NORMS, ROTARY_BUFFER, experts, moe_config, shared_expert
from megalign.convert.hf.config_json import ConfigFile
from megalign.convert.hf.rope import read_rope, rope_section, yarn_mscale
from megalign.convert.rules import HF, LAYER, Axis, Family, Piece, Rule, register
from megalign.model_config import LatentConfig, ModelConfig, MoeConfig, Rope


def rope_v2(hf: ConfigFile, head_dim: int) -> Rope:
    """Read the rotary part of each head; always interleaved (transformers ignores `rope_interleave` for V2)."""
    return read_rope(hf, rope_section(hf), head_dim=hf.whole("qk_rope_head_dim"), interleaved=True)


def rope_v3(hf: ConfigFile, head_dim: int) -> Rope:
    """Read the rotary part of each head, interleaved where `rope_interleave` says so."""
    return replace(rope_v2(hf, head_dim), interleaved=hf.flag("rope_interleave"))


def moe(hf: ConfigFile) -> MoeConfig | None:
    """Read the experts' configuration; the first `first_k_dense_replace` layers are dense."""
    num_layers = hf.whole("num_hidden_layers")
    num_dense = 0 if hf.value("first_k_dense_replace") in (None, 0) else hf.whole("first_k_dense_replace")
    if num_dense >= num_layers:
        return None
    if hf.value("moe_layer_freq") not in (None, 1):
        hf.refuse("moe_layer_freq", "must be 1")
    config = moe_config(hf, ffn="moe_intermediate_size", normalize=False, experts="n_routed_experts")
    shared = hf.whole("n_shared_experts") * config.ffn_size
    scale = hf.number("routed_scaling_factor")
    return replace(config, shared_ffn_size=shared, dense_layers=tuple(range(num_dense)), scale=scale)


def moe_v2(hf: ConfigFile) -> MoeConfig | None:
    """Read V2's router: softmax scores, whose routing weights are not normalised to sum to one."""
    config, method = moe(hf), hf.value("topk_method")
    if hf.value("norm_topk_prob"):
        hf.refuse("norm_topk_prob", "must be false (transformers ignores it for DeepSeek-V2)")
    if method not in ("greedy", "group_limited_greedy"):
        hf.refuse("topk_method", "must be greedy or group_limited_greedy")
    if config is None or method == "greedy":
        return config
    return _grouped(hf, config, best=1)


def moe_v3(hf: ConfigFile) -> MoeConfig | None:
    """Read V3's router: sigmoid scores, with a routing bias that affects only which experts are chosen."""
    config = moe(hf)
    if config is None:
        return None
    config = replace(config, score="sigmoid", selection_bias=True, normalize=hf.flag("norm_topk_prob"))
    return _grouped(hf, config, best=2)


def _grouped(hf: ConfigFile, config: MoeConfig, *, best: int) -> MoeConfig:
    groups, top = hf.whole("n_group"), hf.whole("topk_group")
    if config.num_experts % groups or config.num_experts // groups < best:
        hf.refuse("n_group", f"must divide n_routed_experts, {config.num_experts}, into groups of {best} or more")
    if top > groups or top * (config.num_experts // groups) < config.top_k:
        hf.refuse("topk_group", f"must be at most {groups} groups, with {config.top_k} experts or more together")
    return replace(config, groups=groups, top_groups=top, group_best=best)


def details(hf: ConfigFile, model: ModelConfig) -> ModelConfig:
    """Add latent attention, and the attention scale with YaRN's mscale."""
    if hf.flag("mlp_bias"):
        hf.refuse("mlp_bias", "must be false")
    if model.num_kv_heads != model.num_heads:
        hf.refuse("num_key_value_heads", f"must be num_attention_heads, {model.num_heads}")
    query_rank = None if hf.value("q_lora_rank") is None else hf.whole("q_lora_rank")
    latent = LatentConfig(query_rank, hf.whole("kv_lora_rank"), hf.whole("qk_nope_head_dim"), hf.whole("v_head_dim"))
    model = replace(model, latent=latent)
    scale, section = model.key_dim**-0.5, rope_section(hf)
    if model.rope.scaling is not None and section is not None and section.value("mscale_all_dim"):
        scale *= yarn_mscale(section.number("factor"), section.number("mscale_all_dim")) ** 2
    return replace(model, attention_scale=scale)


def details_v2(hf: ConfigFile, model: ModelConfig) -> ModelConfig:
    """Add V2's details: its rotary embedding is computed in fp32."""
    return replace(details(hf, model), rope_fp32=True)


def _direct(model: ModelConfig) -> bool:
    return model.latent is not None and model.latent.query_rank is None


def _low_rank(model: ModelConfig) -> bool:
    return not _direct(model)


def _linear(megatron: str, name: str, axes: tuple[Axis, Axis], *, tp_dim: int | None, **rule: object) -> Rule:
    weight = Piece(f"{HF}.self_attn.{name}.weight", axes)
    return Rule(f"{LAYER}.self_attention.{megatron}.weight", (weight,), tp_dim=tp_dim, **rule)  # type: ignore[arg-type]


def _bias(megatron: str, name: str, axis: Axis) -> Rule:
    bias = Piece(f"{HF}.self_attn.{name}.bias", (axis,))
    return Rule(f"{LAYER}.self_attention.{megatron}.bias", (bias,), when=attrgetter("qkv_bias"))


def _norm(megatron: str, name: str, axis: Axis) -> Rule:
    return Rule(f"{LAYER}.self_attention.{megatron}.weight", (Piece(f"{HF}.self_attn.{name}.weight", (axis,)),))


LATENT_ATTENTION = (
    _linear("linear_q_proj", "q_proj", ("latent_query", "hidden"), tp_dim=0, when=_direct),
    _linear("linear_q_down_proj", "q_a_proj", ("query_rank", "hidden"), tp_dim=None, when=_low_rank),
    replace(
        _bias("linear_q_down_proj", "q_a_proj", "query_rank"), when=lambda model: model.qkv_bias and _low_rank(model)
    ),
    replace(_norm("q_layernorm", "q_a_layernorm", "query_rank"), when=_low_rank),
    _linear("linear_q_up_proj", "q_b_proj", ("latent_query", "query_rank"), tp_dim=0, when=_low_rank),
    _linear("linear_kv_down_proj", "kv_a_proj_with_mqa", ("latent_and_rope", "hidden"), tp_dim=None),
    _bias("linear_kv_down_proj", "kv_a_proj_with_mqa", "latent_and_rope"),
    _norm("kv_layernorm", "kv_a_layernorm", "latent_rank"),
    _linear("linear_kv_up_proj", "kv_b_proj", ("latent_key_value", "latent_rank"), tp_dim=0),
    _linear("linear_proj", "o_proj", ("hidden", "latent_value"), tp_dim=1),
    _bias("linear_proj", "o_proj", "hidden"),
)
RULES = FIRST + NORMS + LATENT_ATTENTION + MLP + experts("mlp") + shared_expert("shared_experts") + LAST
ROUTING_BIAS = Rule(
    f"{LAYER}.mlp.router.expert_bias",
    (Piece(f"{HF}.mlp.gate.e_score_correction_bias", ("experts",)),),
    within=ModelConfig.has_experts,
    dtype=torch.float32,
)
DEFAULTS = {
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
}
DEEPSEEK_V2 = register(
    Family(
        name="deepseek_v2",
        architecture="DeepseekV2ForCausalLM",
        rules=RULES,
        switches={"qkv_bias": "attention_bias", "out_bias": "attention_bias"},
        defaults={
            **DEFAULTS,
            "max_position_embeddings": 2048,
            "first_k_dense_replace": 0,
            "moe_intermediate_size": 1407,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.0,
            "topk_method": "greedy",
        },
        rope=rope_v2,
        moe=moe_v2,
        details=details_v2,
        ignorable=(ROTARY_BUFFER,),
    )
)
DEEPSEEK_V3 = register(
    Family(
        name="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        rules=(*RULES, ROUTING_BIAS),
        switches={"qkv_bias": "attention_bias", "out_bias": "attention_bias"},
        defaults={
            **DEFAULTS,
            "max_position_embeddings": 4096,
            "first_k_dense_replace": 3,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_interleave": True,
        },
        rope=rope_v3,
        moe=moe_v3,
        details=details,
        ignorable=(ROTARY_BUFFER, r"model\.layers\.{num_layers}\..*"),
    )
)
