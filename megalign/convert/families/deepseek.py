"""DeepSeek-V2 and -V3: latent attention, shared experts, a router that is limited to groups of experts.

V3's layer for predicting one token more (`num_nextn_predict_layers`) is not read, as in transformers.
"""

from dataclasses import replace
from operator import attrgetter

import torch

from megalign.convert.config_file import ConfigFile
from megalign.convert.families.parts import FIRST, LAST, MLP, NORMS, ROTARY_BUFFER, experts, moe_config, shared_expert
from megalign.convert.model_config import LatentConfig, ModelConfig, MoeConfig, Rope
from megalign.convert.rope_config import read_rope, rope_section, yarn_mscale
from megalign.convert.rules import HF, LAYER, Axis, Family, Piece, Rule, register


def rope_v2(config: ConfigFile, head_dim: int) -> Rope:
    """Of the part of each head that turns, neighbours together whatever `rope_interleave` says."""
    return read_rope(config, rope_section(config), head_dim=config.whole("qk_rope_head_dim"), interleaved=True)


def rope_v3(config: ConfigFile, head_dim: int) -> Rope:
    """The same, by `rope_interleave`."""
    return replace(rope_v2(config, head_dim), interleaved=config.flag("rope_interleave"))


def moe(config: ConfigFile) -> MoeConfig | None:
    """The experts of all layers but the first `first_k_dense_replace`."""
    num_layers = config.whole("num_hidden_layers")
    num_dense = 0 if config.value("first_k_dense_replace") in (None, 0) else config.whole("first_k_dense_replace")
    if num_dense >= num_layers:
        return None
    if config.value("moe_layer_freq") not in (None, 1):
        config.refuse("moe_layer_freq", "allowed: 1")
    found = moe_config(config, ffn="moe_intermediate_size", normalize=False, experts="n_routed_experts")
    shared = config.whole("n_shared_experts") * found.ffn_size
    scale = config.number("routed_scaling_factor")
    return replace(found, shared_ffn_size=shared, dense_layers=tuple(range(num_dense)), scale=scale)


def moe_v2(config: ConfigFile) -> MoeConfig | None:
    """Softmax shares that are not scaled to sum to one."""
    found, method = moe(config), config.value("topk_method")
    if config.value("norm_topk_prob"):
        config.refuse("norm_topk_prob", "allowed: false (transformers computes DeepSeek-V2 without)")
    if method not in ("greedy", "group_limited_greedy"):
        config.refuse("topk_method", "allowed: greedy, group_limited_greedy")
    if found is None or method == "greedy":
        return found
    return _grouped(config, found, best=1)


def moe_v3(config: ConfigFile) -> MoeConfig | None:
    """Sigmoid scores, with a bias for the choice alone."""
    found = moe(config)
    if found is None:
        return None
    found = replace(found, score="sigmoid", selection_bias=True, normalize=config.flag("norm_topk_prob"))
    return _grouped(config, found, best=2)


def _grouped(config: ConfigFile, found: MoeConfig, *, best: int) -> MoeConfig:
    groups, top = config.whole("n_group"), config.whole("topk_group")
    if found.num_experts % groups or found.num_experts // groups < best:
        config.refuse("n_group", f"it must divide n_routed_experts, {found.num_experts}, into groups of {best} or more")
    if top > groups or top * (found.num_experts // groups) < found.top_k:
        config.refuse("topk_group", f"needed: at most {groups} groups, with {found.top_k} experts or more together")
    return replace(found, groups=groups, top_groups=top, group_best=best)


def details(config: ConfigFile, cfg: ModelConfig) -> ModelConfig:
    """The latent attention, and how sharp YaRN makes it."""
    if config.flag("mlp_bias"):
        config.refuse("mlp_bias", "allowed: false")
    if cfg.num_kv_heads != cfg.num_heads:
        config.refuse("num_key_value_heads", f"it must be num_attention_heads, {cfg.num_heads}")
    query_rank = None if config.value("q_lora_rank") is None else config.whole("q_lora_rank")
    latent = LatentConfig(
        query_rank, config.whole("kv_lora_rank"), config.whole("qk_nope_head_dim"), config.whole("v_head_dim")
    )
    cfg = replace(cfg, latent=latent)
    scale, section = cfg.key_dim**-0.5, rope_section(config)
    if cfg.rope.scaling is not None and section is not None and section.value("mscale_all_dim"):
        scale *= yarn_mscale(section.number("factor"), section.number("mscale_all_dim")) ** 2
    return replace(cfg, attention_scale=scale)


def details_v2(config: ConfigFile, cfg: ModelConfig) -> ModelConfig:
    """V2 turns in fp32."""
    return replace(details(config, cfg), rope_fp32=True)


def _direct(cfg: ModelConfig) -> bool:
    return cfg.latent is not None and cfg.latent.query_rank is None


def _low_rank(cfg: ModelConfig) -> bool:
    return not _direct(cfg)


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
    replace(_bias("linear_q_down_proj", "q_a_proj", "query_rank"), when=lambda cfg: cfg.qkv_bias and _low_rank(cfg)),
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
SELECTION_BIAS = Rule(
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
        rules=(*RULES, SELECTION_BIAS),
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
