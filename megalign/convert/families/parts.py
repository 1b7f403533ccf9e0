"""Holds conversion rules and config.json readers that several model families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter

from megalign.convert.hf.config_json import ConfigFile
from megalign.convert.hf.rope import ORIGINAL, read_rope
from megalign.convert.rules import EMBED, HF, LAYER, QKV, STACK2, Axis, Piece, Rule, Window
from megalign.model_config import ModelConfig, MoeConfig, Rope


def windows(hf: ConfigFile, slides: Callable[[int], bool]) -> Window:
    """Return the sliding window and the full-attention layers, by `layer_types` or, where absent, `slides(layer)`."""
    num_layers, kinds = hf.whole("num_hidden_layers"), hf.value("layer_types")
    if kinds is None:
        full = tuple(layer for layer in range(num_layers) if not slides(layer))
    else:
        known = isinstance(kinds, list) and all(kind in ("full_attention", "sliding_attention") for kind in kinds)
        if not known or len(kinds) != num_layers:
            hf.refuse("layer_types", f"must be full_attention or sliding_attention for each of {num_layers} layers")
        full = tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")
    if len(full) == num_layers:
        return None, ()
    return hf.whole("sliding_window"), full


def window_by_switch(
    hf: ConfigFile, *, slides: Callable[[int, int], bool] = lambda layer, bound: layer >= bound
) -> Window:
    """Return Qwen's sliding window: none unless `use_sliding_window`; `slides` takes (layer, max_window_layers)."""
    if not hf.flag("use_sliding_window") or hf.value("sliding_window") is None:
        return None, ()
    bound = hf.value("max_window_layers")
    return windows(hf, lambda layer: slides(layer, bound))


def rope_by_kind(hf: ConfigFile, kind: str, head_dim: int, *, theta_key: str = "rope_theta") -> Rope:
    """Read the rotary parameters of one kind of layers, `full_attention` or `sliding_attention`.

    Before transformers 5 `rope_scaling` was for full-attention layers alone. Refuses combinations that transformers
    interprets differently from what is written.
    """
    section = None
    if hf.value("rope_parameters"):
        both = hf.section("rope_parameters")
        if not {"full_attention", "sliding_attention"} & both.fields.keys():
            hf.refuse("rope_parameters", "must be full_attention and sliding_attention, with parameters each")
        if hf.value("rope_scaling"):
            hf.refuse("rope_scaling", "must be absent beside rope_parameters")
        section = both.section(kind) if both.value(kind) is not None else None
    elif hf.value("rope_scaling") and kind == "full_attention":
        section = hf.section("rope_scaling")
    if section is not None and section.value("truncate") is False:
        section.refuse("truncate", "must be true where rotary parameters differ by layer type")
    inside = {key: value for key, value in hf.fields.items() if key != ORIGINAL}  # only a section may have it here
    outer = ConfigFile(hf.path, inside, hf.defaults, hf.prefix)
    return read_rope(outer, section, head_dim=head_dim, theta_key=theta_key)


def moe_config(hf: ConfigFile, *, ffn: str, normalize: bool, experts: str | None = None) -> MoeConfig:
    """Read number and size of the experts; transformers names their number num_experts or num_local_experts."""
    if experts is None:
        experts = "num_experts" if hf.fields.get("num_local_experts") is None else "num_local_experts"
    num_experts, top_k = hf.whole(experts), hf.whole("num_experts_per_tok")
    if hf.fields.get("num_experts") not in (None, num_experts):
        hf.refuse("num_experts", f"must agree with num_local_experts, {num_experts}")
    if top_k > num_experts:
        hf.refuse("num_experts_per_tok", f"must be at most {experts}, {num_experts}")
    if top_k == 1 and normalize:
        hf.refuse("num_experts_per_tok", "must be at least 2 where routing weights sum to one: a single one is 1")
    return MoeConfig(num_experts, top_k, hf.whole(ffn), normalize)


def dense_layers(hf: ConfigFile) -> tuple[int, ...]:
    """Return Qwen's dense layers: those in `mlp_only_layers`, and all but every `decoder_sparse_step`-th."""
    step, listed = hf.whole("decoder_sparse_step"), hf.value("mlp_only_layers") or []
    num_layers = hf.whole("num_hidden_layers")
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        hf.refuse("mlp_only_layers", "must be a list of layer numbers")
    dense = tuple(layer for layer in range(num_layers) if layer in listed or (layer + 1) % step)
    if len(dense) == num_layers:
        key = "mlp_only_layers" if step <= num_layers else "decoder_sparse_step"
        hf.refuse(key, f"must leave a layer with experts among the {num_layers}")
    return dense


FIRST = (Rule("embedding.word_embeddings.weight", (EMBED,), tp_dim=0),)
LAST = (
    Rule("decoder.final_layernorm.weight", (Piece("model.norm.weight", ("hidden",)),)),
    Rule(
        "output_layer.weight",
        (Piece("lm_head.weight", ("vocab", "hidden")),),
        tp_dim=0,
        when=lambda model: not model.tied,
    ),
    Rule("output_layer.weight", (EMBED,), tp_dim=0, when=attrgetter("tied"), copy=True),
)


def _rows(kind: str, names: Mapping[str, Axis]) -> tuple[Piece, ...]:
    axes: tuple[Axis, ...] = ("hidden",) if kind == "weight" else ()
    return tuple(Piece(f"{HF}.{name}.{kind}", (axis, *axes)) for name, axis in names.items())


_QKV_ROWS: Mapping[str, Axis] = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key_value",
    "self_attn.v_proj": "key_value",
}
_FC1_ROWS: Mapping[str, Axis] = {"mlp.gate_proj": "ffn", "mlp.up_proj": "ffn"}


def norm(megatron: str, name: str) -> Rule:
    """Return the rule of a layer's norm over the hidden state."""
    return Rule(f"{LAYER}.{megatron}.weight", (Piece(f"{HF}.{name}.weight", ("hidden",)),))


NORMS = (norm("input_layernorm", "input_layernorm"), norm("pre_mlp_layernorm", "post_attention_layernorm"))
# Norms before and after both attention and MLP, under Gemma's names.
FOUR_NORMS = (
    norm("input_layernorm", "input_layernorm"),
    norm("self_attention.post_norm", "post_attention_layernorm"),
    norm("pre_mlp_layernorm", "pre_feedforward_layernorm"),
    norm("mlp.post_norm", "post_feedforward_layernorm"),
)
ATTENTION = (
    Rule(f"{LAYER}.self_attention.linear_qkv.weight", _rows("weight", _QKV_ROWS), tp_dim=0, layout=QKV),
    Rule(
        f"{LAYER}.self_attention.linear_proj.weight",
        (Piece(f"{HF}.self_attn.o_proj.weight", ("hidden", "query")),),
        tp_dim=1,
    ),
)
QKV_BIAS = (
    Rule(
        f"{LAYER}.self_attention.linear_qkv.bias",
        _rows("bias", _QKV_ROWS),
        tp_dim=0,
        layout=QKV,
        when=attrgetter("qkv_bias"),
    ),
)
# Hugging Face fuses query, key and value into one matrix, gate and up into another.
_FUSED_QKV: tuple[Axis, ...] = ("query", "key_value", "key_value")
FUSED_ATTENTION = (
    Rule(
        f"{LAYER}.self_attention.linear_qkv.weight",
        tuple(
            Piece(f"{HF}.self_attn.qkv_proj.weight", (axis, "hidden"), rows=_FUSED_QKV, block=block)
            for block, axis in enumerate(_FUSED_QKV)
        ),
        tp_dim=0,
        layout=QKV,
    ),
    ATTENTION[1],
)
# The bias of a row-parallel layer is added after the all-reduce, so every rank holds all of it.
OUT_BIAS = (
    Rule(
        f"{LAYER}.self_attention.linear_proj.bias",
        (Piece(f"{HF}.self_attn.o_proj.bias", ("hidden",)),),
        when=attrgetter("out_bias"),
    ),
)
QK_NORM = (
    Rule(f"{LAYER}.self_attention.q_layernorm.weight", (Piece(f"{HF}.self_attn.q_norm.weight", ("head_dim",)),)),
    Rule(f"{LAYER}.self_attention.k_layernorm.weight", (Piece(f"{HF}.self_attn.k_norm.weight", ("head_dim",)),)),
)


def _dense(model: ModelConfig, layer: int) -> bool:
    return not model.has_experts(layer)


MLP = (
    Rule(f"{LAYER}.mlp.linear_fc1.weight", _rows("weight", _FC1_ROWS), tp_dim=0, layout=STACK2, within=_dense),
    Rule(
        f"{LAYER}.mlp.linear_fc2.weight",
        (Piece(f"{HF}.mlp.down_proj.weight", ("hidden", "ffn")),),
        tp_dim=1,
        within=_dense,
    ),
)


FUSED_MLP = (
    Rule(
        f"{LAYER}.mlp.linear_fc1.weight",
        tuple(
            Piece(f"{HF}.mlp.gate_up_proj.weight", ("ffn", "hidden"), rows=("ffn", "ffn"), block=block)
            for block in range(2)
        ),
        tp_dim=0,
        layout=STACK2,
        within=_dense,
    ),
    MLP[1],
)


def experts(block: str, *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Rule, ...]:
    """Return the rules of router and experts; experts are never split by tensor parallelism."""
    home = f"{HF}.{block}.experts.{{e}}"
    rows: tuple[Axis, ...] = ("expert_ffn", "hidden")
    mine = f"{LAYER}.mlp.experts.local_experts.{{e}}"
    return (
        Rule(
            f"{LAYER}.mlp.router.weight",
            (Piece(f"{HF}.{block}.gate.weight", ("experts", "hidden")),),
            within=ModelConfig.has_experts,
        ),
        Rule(
            f"{mine}.linear_fc1.weight",
            (Piece(f"{home}.{gate}.weight", rows), Piece(f"{home}.{up}.weight", rows)),
            layout=STACK2,
            within=ModelConfig.has_experts,
        ),
        Rule(
            f"{mine}.linear_fc2.weight",
            (Piece(f"{home}.{down}.weight", ("hidden", "expert_ffn")),),
            within=ModelConfig.has_experts,
        ),
    )


def _has_shared(model: ModelConfig) -> bool:
    return model.moe is not None and model.moe.shared_ffn_size > 0


_SHARED_ROWS: tuple[Axis, ...] = ("shared_ffn", "hidden")


def shared_expert(block: str) -> tuple[Rule, ...]:
    """Return the rules of the shared expert, which tensor parallelism splits like any MLP."""
    return (
        Rule(
            f"{LAYER}.mlp.shared_experts.linear_fc1.weight",
            tuple(Piece(f"{HF}.mlp.{block}.{name}_proj.weight", _SHARED_ROWS) for name in ("gate", "up")),
            tp_dim=0,
            layout=STACK2,
            when=_has_shared,
            within=ModelConfig.has_experts,
        ),
        Rule(
            f"{LAYER}.mlp.shared_experts.linear_fc2.weight",
            (Piece(f"{HF}.mlp.{block}.down_proj.weight", ("hidden", "shared_ffn")),),
            tp_dim=1,
            when=_has_shared,
            within=ModelConfig.has_experts,
        ),
    )


SHARED_EXPERT = (
    *shared_expert("shared_expert"),
    Rule(
        f"{LAYER}.mlp.shared_experts.gate_weight",
        (Piece(f"{HF}.mlp.shared_expert_gate.weight", ("one", "hidden")),),
        when=lambda model: model.moe is not None and model.moe.shared_gate,
        within=ModelConfig.has_experts,
    ),
)
MLP_BIAS = (
    Rule(
        f"{LAYER}.mlp.linear_fc1.bias",
        _rows("bias", _FC1_ROWS),
        tp_dim=0,
        layout=STACK2,
        when=attrgetter("mlp_bias"),
    ),
    Rule(
        f"{LAYER}.mlp.linear_fc2.bias",
        (Piece(f"{HF}.mlp.down_proj.bias", ("hidden",)),),
        when=attrgetter("mlp_bias"),
    ),
)
ROTARY_BUFFER = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
