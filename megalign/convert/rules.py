"""How tensors of a Hugging Face checkpoint become Megatron's and back: one rule, read in both directions.

A rule joins whole Hugging Face tensors ("pieces") into one Megatron tensor. Tensor parallelism cuts every piece into
equal contiguous parts along the rule's `tp_dim` first and joins afterwards, so one rule serves every size: Megatron's
interleaving of query, key and value, or of gate and up rows, is the same on a part as on the whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor

from megalign.convert.config_file import ConfigFile
from megalign.convert.model_config import ModelConfig, MoeConfig

Axis = Literal["vocab", "hidden", "ffn", "query", "key_value", "head_dim", "experts", "expert_ffn", "shared_ffn", "one"]


def axis_size(axis: Axis, cfg: ModelConfig) -> int:
    if cfg.moe is not None and axis in ("experts", "expert_ffn", "shared_ffn"):
        moe = cfg.moe
        return {"experts": moe.num_experts, "expert_ffn": moe.ffn_size, "shared_ffn": moe.shared_ffn_size}[axis]
    return {
        "one": 1,
        "vocab": cfg.vocab_size,
        "hidden": cfg.hidden_size,
        "ffn": cfg.ffn_size,
        "query": cfg.num_heads * cfg.head_dim,
        "key_value": cfg.num_kv_heads * cfg.head_dim,
        "head_dim": cfg.head_dim,
    }[axis]


@dataclass(frozen=True, slots=True)
class Piece:
    """One Hugging Face tensor and what its dimensions run over."""

    name: str
    axes: tuple[Axis, ...]

    def shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        return tuple(axis_size(axis, cfg) for axis in self.axes)


@dataclass(frozen=True, slots=True)
class Layout:
    """How Megatron lays a rule's pieces into one tensor; `split` undoes `join`, on parts as on wholes."""

    join: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    split: Callable[[Tensor, ModelConfig], Sequence[Tensor]]


def _join_qkv(pieces: Sequence[Tensor], cfg: ModelConfig) -> Tensor:
    """[query rows, ...], [key rows, ...], [value rows, ...] -> by key-value group: its queries, its key, its value."""
    num_groups = pieces[1].shape[0] // cfg.head_dim
    grouped = [piece.reshape(num_groups, -1, *piece.shape[1:]) for piece in pieces]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split_qkv(tensor: Tensor, cfg: ModelConfig) -> Sequence[Tensor]:
    rows = [cfg.num_heads // cfg.num_kv_heads * cfg.head_dim, cfg.head_dim, cfg.head_dim]
    grouped = tensor.reshape(-1, sum(rows), *tensor.shape[1:])
    return [piece.flatten(0, 1) for piece in grouped.split(rows, dim=1)]


WHOLE = Layout(join=lambda pieces, cfg: pieces[0], split=lambda tensor, cfg: [tensor])
STACK2 = Layout(join=lambda pieces, cfg: torch.cat(list(pieces)), split=lambda tensor, cfg: tensor.chunk(2))
QKV = Layout(join=_join_qkv, split=_split_qkv)


@dataclass(frozen=True, slots=True)
class Rule:
    """A Megatron parameter and the Hugging Face tensors it is joined from; `{i}` is the layer, `{e}` the expert."""

    megatron: str
    pieces: tuple[Piece, ...]
    tp_dim: int | None = None
    layout: Layout = WHOLE
    when: Callable[[ModelConfig], bool] = lambda cfg: True
    within: Callable[[ModelConfig, int], bool] = lambda cfg, layer: True  # which layers have it
    copy: bool = False  # a second home of tensors that another rule owns: read, never written

    def places(self, cfg: ModelConfig, layers: Iterable[int], experts: Sequence[int]) -> Iterator[Mapping[str, int]]:
        """What `{i}` and `{e}` stand for in every parameter of this rule that a part of the model has."""
        if not self.when(cfg):
            return
        for layer in layers if "{i}" in self.megatron else (0,):
            if self.within(cfg, layer):
                yield from ({"i": layer, "e": expert} for expert in (experts if "{e}" in self.megatron else (0,)))


@dataclass(frozen=True, slots=True)
class Family:
    """One Hugging Face architecture: its tensors, and where its config.json deviates from the common fields."""

    name: str  # model_type
    architecture: str
    rules: tuple[Rule, ...]
    switches: Mapping[str, str | bool]  # ModelConfig flag -> the config.json flag it follows, or a constant
    defaults: Mapping[str, Any]  # transformers' own, for fields a config.json leaves out
    window: Callable[[ConfigFile], int | None] = lambda config: None
    moe: Callable[[ConfigFile], MoeConfig | None] = lambda config: None
    ignorable: tuple[str, ...] = ()  # regular expressions: stored by some writers, computed by every reader
    by_name: Mapping[str, tuple[Rule, ...]] = field(init=False)

    def __post_init__(self) -> None:
        index: dict[str, tuple[Rule, ...]] = {}
        for rule in self.rules:
            index[rule.megatron] = (*index.get(rule.megatron, ()), rule)
        object.__setattr__(self, "by_name", index)


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    FAMILIES[family.name] = family
    return family


_NUMBER = re.compile(r"(decoder\.layers|local_experts)\.(\d+)\.")


def find_rule(name: str, cfg: ModelConfig) -> tuple[Rule, Mapping[str, int]]:
    """The rule of a Megatron parameter, and which layer `i` and expert `e` it is of (0 where it is of none)."""
    place = {"i": 0, "e": 0}

    def generic(match: re.Match[str]) -> str:
        key = "i" if match[1] == "decoder.layers" else "e"
        place[key] = int(match[2])
        return f"{match[1]}.{{{key}}}."

    template = _NUMBER.sub(generic, name)
    num_experts = 1 if cfg.moe is None else cfg.moe.num_experts
    for rule in FAMILIES[cfg.family].by_name.get(template, ()):
        inside = place["i"] < cfg.num_layers and place["e"] < num_experts
        if inside and rule.when(cfg) and rule.within(cfg, place["i"]):
            return rule, place
    raise ValueError(f"{name} is not a parameter of this {cfg.family} model")


_MIXTRAL_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def lora_target(piece: str) -> str:
    """What `lora.targets` calls the linear layer of a Hugging Face weight: the last part of its name, or its twin's."""
    last = piece.removesuffix(".weight").rpartition(".")[2]
    return _MIXTRAL_NAMES.get(last, last)


def lora_targets(cfg: ModelConfig) -> list[str]:
    """What `lora.targets` may name in this model: its layers' matrices but routers and gates."""
    experts = range(0 if cfg.moe is None else cfg.moe.num_experts)
    found = {
        lora_target(piece.name)
        for rule in FAMILIES[cfg.family].rules
        if any(rule.places(cfg, range(cfg.num_layers), experts)) and "{i}" in rule.megatron
        for piece in rule.pieces
    }
    return sorted(name for name in found if name.endswith("_proj"))


def window_by_layer(
    config: ConfigFile, *, slides: Callable[[int, int], bool] = lambda layer, bound: layer >= bound
) -> int | None:
    """Qwen's switch: a window on the layers that `layer_types` lists, or that `slides(layer, max_window_layers)`."""
    if not config.flag("use_sliding_window") or config.value("sliding_window") is None:
        return None
    num_layers, bound = config.whole("num_hidden_layers"), config.value("max_window_layers")
    kinds = config.value("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if slides(layer, bound) else "full_attention" for layer in range(num_layers)]
    if set(kinds) == {"full_attention"}:
        return None
    if set(kinds) != {"sliding_attention"}:
        config.refuse("use_sliding_window", "only all layers or none may slide, this checkpoint mixes them")
    return config.whole("sliding_window")


def moe_config(config: ConfigFile, *, ffn: str, normalize: bool) -> MoeConfig:
    """The experts, of which transformers writes the number under either name, by family and version."""
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


LAYER, HF = "decoder.layers.{i}", "model.layers.{i}"
EMBED = Piece("model.embed_tokens.weight", ("vocab", "hidden"))
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

NORMS = (
    Rule(f"{LAYER}.input_layernorm.weight", (Piece(f"{HF}.input_layernorm.weight", ("hidden",)),)),
    Rule(f"{LAYER}.pre_mlp_layernorm.weight", (Piece(f"{HF}.post_attention_layernorm.weight", ("hidden",)),)),
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


# The expert that every token passes is cut over tensor ranks like any MLP.
_SHARED_ROWS: tuple[Axis, ...] = ("shared_ffn", "hidden")
SHARED_EXPERT = (
    Rule(
        f"{LAYER}.mlp.shared_experts.linear_fc1.weight",
        tuple(Piece(f"{HF}.mlp.shared_expert.{name}_proj.weight", _SHARED_ROWS) for name in ("gate", "up")),
        tp_dim=0,
        layout=STACK2,
        when=_has_shared,
        within=ModelConfig.has_experts,
    ),
    Rule(
        f"{LAYER}.mlp.shared_experts.linear_fc2.weight",
        (Piece(f"{HF}.mlp.shared_expert.down_proj.weight", ("hidden", "shared_ffn")),),
        tp_dim=1,
        when=_has_shared,
        within=ModelConfig.has_experts,
    ),
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
