"""What the families' tables are put together from: rules that many share, and fields of config.json that many write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter

from megalign.convert.config_file import ConfigFile
from megalign.convert.model_config import ModelConfig, MoeConfig, Rope
from megalign.convert.rope_config import ORIGINAL, read_rope
from megalign.convert.rules import EMBED, HF, LAYER, QKV, STACK2, Axis, Piece, Rule, Window


def windows(config: ConfigFile, slides: Callable[[int], bool]) -> Window:
    """`sliding_window` on the layers that `layer_types` lists, or where it is not written, those that `slides` says."""
    num_layers, kinds = config.whole("num_hidden_layers"), config.value("layer_types")
    if kinds is None:
        full = tuple(layer for layer in range(num_layers) if not slides(layer))
    else:
        known = isinstance(kinds, list) and all(one in ("full_attention", "sliding_attention") for one in kinds)
        if not known or len(kinds) != num_layers:
            config.refuse("layer_types", f"needed: full_attention or sliding_attention for each of {num_layers} layers")
        full = tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")
    if len(full) == num_layers:
        return None, ()
    return config.whole("sliding_window"), full


def window_by_switch(
    config: ConfigFile, *, slides: Callable[[int, int], bool] = lambda layer, bound: layer >= bound
) -> Window:
    """Qwen's: `use_sliding_window` first, then `layer_types` or what `slides(layer, max_window_layers)`."""
    if not config.flag("use_sliding_window") or config.value("sliding_window") is None:
        return None, ()
    bound = config.value("max_window_layers")
    return windows(config, lambda layer: slides(layer, bound))


def rope_by_kind(config: ConfigFile, kind: str, head_dim: int, *, theta_key: str = "rope_theta") -> Rope:
    """The positions of `full_attention` or `sliding_attention` layers, which have parameters of their own.

    Before transformers 5 `rope_scaling` was for the full ones alone. Refused is what transformers reads otherwise than
    it is written.
    """
    section = None
    if config.value("rope_parameters"):
        both = config.section("rope_parameters")
        if not {"full_attention", "sliding_attention"} & both.fields.keys():
            config.refuse("rope_parameters", "needed: full_attention and sliding_attention, with parameters each")
        if config.value("rope_scaling"):
            config.refuse("rope_scaling", "allowed: nothing beside rope_parameters")
        section = both.section(kind) if both.value(kind) is not None else None
    elif config.value("rope_scaling") and kind == "full_attention":
        section = config.section("rope_scaling")
    if section is not None and section.value("truncate") is False:
        section.refuse("truncate", "allowed: true, where layers have parameters by their type")
    inside = {key: value for key, value in config.fields.items() if key != ORIGINAL}  # it is the section's alone
    outer = ConfigFile(config.path, inside, config.defaults, config.prefix)
    return read_rope(outer, section, head_dim=head_dim, theta_key=theta_key)


def moe_config(config: ConfigFile, *, ffn: str, normalize: bool, experts: str | None = None) -> MoeConfig:
    """The experts, of which transformers writes the number under either name, by family and version."""
    if experts is None:
        experts = "num_experts" if config.fields.get("num_local_experts") is None else "num_local_experts"
    num_experts, top_k = config.whole(experts), config.whole("num_experts_per_tok")
    if config.fields.get("num_experts") not in (None, num_experts):
        config.refuse("num_experts", f"it must agree with num_local_experts, {num_experts}")
    if top_k > num_experts:
        config.refuse("num_experts_per_tok", f"it must be at most {experts}, {num_experts}")
    if top_k == 1 and normalize:
        config.refuse(
            "num_experts_per_tok", "with shares that sum to one it must be at least 2: one expert's is always 1"
        )
    return MoeConfig(num_experts, top_k, config.whole(ffn), normalize)


def dense_layers(config: ConfigFile) -> tuple[int, ...]:
    """Qwen's layers without experts: those listed, and all but every `decoder_sparse_step`-th."""
    step, listed = config.whole("decoder_sparse_step"), config.value("mlp_only_layers") or []
    num_layers = config.whole("num_hidden_layers")
    if not isinstance(listed, list) or not all(type(one) is int for one in listed):
        config.refuse("mlp_only_layers", "allowed: a list of layer numbers")
    dense = tuple(layer for layer in range(num_layers) if layer in listed or (layer + 1) % step)
    if len(dense) == num_layers:
        key = "mlp_only_layers" if step <= num_layers else "decoder_sparse_step"
        config.refuse(key, f"needed: a layer with experts among the {num_layers}")
    return dense


FIRST = (Rule("embedding.word_embeddings.weight", (EMBED,), tp_dim=0),)
LAST = (
    Rule("decoder.final_layernorm.weight", (Piece("model.norm.weight", ("hidden",)),)),
    Rule(
        "output_layer.weight",
        (Piece("lm_head.weight", ("vocab", "hidden")),),
        tp_dim=0,
        when=lambda cfg: not cfg.tied,
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
    """One of a layer's norms over the hidden state."""
    return Rule(f"{LAYER}.{megatron}.weight", (Piece(f"{HF}.{name}.weight", ("hidden",)),))


NORMS = (norm("input_layernorm", "input_layernorm"), norm("pre_mlp_layernorm", "post_attention_layernorm"))
# Around both attention and MLP, by the names of Gemma.
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
# One matrix of Hugging Face's for query, key and value, one for gate and up.
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
# Bias of a row-parallel layer is added after the reduction: whole on every rank.
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


def _dense(cfg: ModelConfig, layer: int) -> bool:
    return not cfg.has_experts(layer)


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
    """Router and experts of layers that have them; experts are never cut over tensor ranks."""
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


def _has_shared(cfg: ModelConfig) -> bool:
    return cfg.moe is not None and cfg.moe.shared_ffn_size > 0


_SHARED_ROWS: tuple[Axis, ...] = ("shared_ffn", "hidden")


def shared_expert(block: str) -> tuple[Rule, ...]:
    """The expert that every token passes; it is cut over tensor ranks like any MLP."""
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
        when=lambda cfg: cfg.moe is not None and cfg.moe.shared_gate,
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
