"""Defines the rules that map Hugging Face tensors to Megatron parameters; each is used in both directions.

A rule joins whole Hugging Face tensors ("pieces") into one Megatron tensor. Tensor parallelism first splits every piece
into equal contiguous shards along the rule's `tp_dim` and joins afterwards, so one rule serves every tensor-parallel
size: Megatron's interleaving of query, key and value, or of gate and up rows, is the same on a shard as on the whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from megalign.convert.hf.config_json import ConfigFile
from megalign.model_config import ModelConfig, MoeConfig, Rope

Axis = Literal[
    "vocab",
    "hidden",
    "ffn",
    "query",
    "key_value",
    "head_dim",
    "heads",
    "experts",
    "expert_ffn",
    "shared_ffn",
    "one",
    "latent_query",
    "query_rank",
    "latent_rank",
    "latent_and_rope",
    "latent_key_value",
    "latent_value",
]


Window = tuple[int | None, tuple[int, ...]]  # (sliding window or None, layers with full attention nevertheless)


def axis_size(axis: Axis, model: ModelConfig) -> int:
    """Return the size of a tensor dimension that is an `axis`, such as "hidden" or "ffn"."""
    if model.moe is not None and axis in ("experts", "expert_ffn", "shared_ffn"):
        moe = model.moe
        return {"experts": moe.num_experts, "expert_ffn": moe.ffn_size, "shared_ffn": moe.shared_ffn_size}[axis]
    if model.latent is not None and axis in ("query_rank", "latent_rank", "latent_and_rope", "latent_key_value"):
        latent = model.latent
        return {
            "query_rank": latent.query_rank or 0,
            "latent_rank": latent.rank,
            "latent_and_rope": latent.rank + model.rope.dim,
            "latent_key_value": model.num_heads * (latent.nope_dim + latent.value_dim),
        }[axis]
    return {
        "one": 1,
        "vocab": model.vocab_size,
        "hidden": model.hidden_size,
        "ffn": model.ffn_size,
        "query": model.num_heads * model.head_dim,
        "key_value": model.num_kv_heads * model.head_dim,
        "head_dim": model.head_dim,
        "heads": model.num_heads,
        "latent_query": model.num_heads * model.key_dim,
        "latent_value": model.num_heads * model.value_dim,
    }[axis]


@dataclass(frozen=True, slots=True)
class Piece:
    """Describes a matrix or vector of the model: its axes, and its position in a Hugging Face tensor.

    Usually it is the whole Hugging Face tensor. Some families store several pieces in one tensor, or transposed.
    """

    name: str
    axes: tuple[Axis, ...]
    rows: tuple[Axis, ...] = ()  # axes of all pieces that the tensor concatenates by rows; empty: this piece alone
    block: int = 0  # the index of this piece among them
    every: int = 1  # where pieces interleave by rows: this piece has rows block, block + every, ...
    of_experts: bool = False  # the tensor stacks this piece of all experts
    transposed: bool = False

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Return the shape of the matrix or vector."""
        return tuple(axis_size(axis, model) for axis in self.axes)

    @property
    def is_whole(self) -> bool:
        """Whether the Hugging Face tensor is exactly this piece."""
        return not self.rows and self.every == 1 and not self.of_experts and not self.transposed

    def stored_shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Return the shape of the Hugging Face tensor."""
        first, *others = self.shape(model)
        first = sum(axis_size(axis, model) for axis in self.rows) if self.rows else first * self.every
        shape = (*others, first) if self.transposed else (first, *others)
        return (axis_size("experts", model), *shape) if self.of_experts else shape

    def view(self, stored: Tensor, indices: Mapping[str, int], model: ModelConfig) -> Tensor:
        """Return a view of this piece in the Hugging Face tensor, to read or write it."""
        return self.view_of_expert(stored[indices["e"]] if self.of_experts else stored, model)

    def view_of_expert(self, stored: Tensor, model: ModelConfig) -> Tensor:
        """Return a view of this piece in a Hugging Face tensor, or in one expert's row of a stacked one."""
        stored = stored.movedim(-1, 0) if self.transposed else stored
        if self.rows:
            sizes = [axis_size(axis, model) for axis in self.rows]
            stored = stored.split(sizes)[self.block]
        return stored if self.every == 1 else stored[self.block :: self.every]


@dataclass(frozen=True, slots=True)
class Layout:
    """Defines how Megatron concatenates a rule's pieces by rows: `blocks` returns runs of rows in Megatron's order.

    `split` is the inverse of `join`; both work on tensor-parallel shards as on whole tensors.
    """

    blocks: Callable[[Sequence[Tensor], ModelConfig], Sequence[Tensor]]
    split: Callable[[Tensor, ModelConfig], Sequence[Tensor]]

    def join(self, pieces: Sequence[Tensor], model: ModelConfig) -> Tensor:
        """Join pieces into the Megatron tensor; returns a view where it is one piece."""
        blocks = self.blocks(pieces, model)
        return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks))


def _qkv_blocks(pieces: Sequence[Tensor], model: ModelConfig) -> Sequence[Tensor]:
    """Reorder (query, key, value) rows by key-value group: the group's queries, its key, its value."""
    num_groups = pieces[1].shape[0] // model.head_dim
    grouped = [piece.chunk(num_groups) for piece in pieces]
    return [rows for group in zip(*grouped, strict=True) for rows in group]


def _split_qkv(tensor: Tensor, model: ModelConfig) -> Sequence[Tensor]:
    rows = [model.num_heads // model.num_kv_heads * model.head_dim, model.head_dim, model.head_dim]
    grouped = tensor.reshape(-1, sum(rows), *tensor.shape[1:])
    return [piece.flatten(0, 1) for piece in grouped.split(rows, dim=1)]


WHOLE = Layout(blocks=lambda pieces, model: pieces, split=lambda tensor, model: [tensor])
STACK2 = Layout(blocks=lambda pieces, model: pieces, split=lambda tensor, model: tensor.chunk(2))
QKV = Layout(blocks=_qkv_blocks, split=_split_qkv)


@dataclass(frozen=True, slots=True)
class Rule:
    """Maps a Megatron parameter to the Hugging Face tensors it is joined from; `{i}` is the layer, `{e}` the expert."""

    megatron: str
    pieces: tuple[Piece, ...]
    tp_dim: int | None = None
    layout: Layout = WHOLE
    when: Callable[[ModelConfig], bool] = lambda model: True
    within: Callable[[ModelConfig, int], bool] = lambda model, layer: True  # whether a layer has it
    copy: bool = False  # it copies tensors of another rule (tied head): read from Hugging Face, never written
    dtype: torch.dtype | None = None  # None: the model's dtype

    def indices(self, model: ModelConfig, layers: Iterable[int], experts: Sequence[int]) -> Iterator[Mapping[str, int]]:
        """Yield {"i": layer, "e": expert} for each parameter of this rule in the given layers and experts."""
        if not self.when(model):
            return
        for layer in layers if "{i}" in self.megatron else (0,):
            if self.within(model, layer):
                yield from ({"i": layer, "e": expert} for expert in (experts if "{e}" in self.megatron else (0,)))


@dataclass(frozen=True, slots=True)
class Family:
    """Describes a Hugging Face architecture: its tensors, and its config.json where that differs from common fields."""

    name: str  # model_type
    architecture: str
    rules: tuple[Rule, ...]
    switches: Mapping[str, str | bool]  # ModelConfig flag -> the config.json flag it follows, or a constant
    defaults: Mapping[str, Any]  # transformers' defaults for fields missing in config.json
    window: Callable[[ConfigFile], Window] = lambda hf: (None, ())
    rope: Callable[[ConfigFile, int], Rope] | None = None  # from config.json and head_dim; None: the common reader
    moe: Callable[[ConfigFile], MoeConfig | None] = lambda hf: None
    details: Callable[[ConfigFile, ModelConfig], ModelConfig] = lambda hf, model: model  # adds all other fields
    activation: str = "hidden_act"  # name of the config.json field
    ignorable: tuple[str, ...] = ()  # regular expressions: tensors that may be stored but are not read
    by_name: Mapping[str, tuple[Rule, ...]] = field(init=False)

    def __post_init__(self) -> None:
        index: dict[str, tuple[Rule, ...]] = {}
        for rule in self.rules:
            index[rule.megatron] = (*index.get(rule.megatron, ()), rule)
        object.__setattr__(self, "by_name", index)


LAYER, HF = "decoder.layers.{i}", "model.layers.{i}"
EMBED = Piece("model.embed_tokens.weight", ("vocab", "hidden"))
FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Add a family to FAMILIES and return it."""
    FAMILIES[family.name] = family
    return family


_NUMBER = re.compile(r"(decoder\.layers|local_experts)\.(\d+)\.")


def find_rule(name: str, model: ModelConfig) -> tuple[Rule, Mapping[str, int]]:
    """Return a Megatron parameter's rule, and its layer "i" and expert "e" (0 where it has none)."""
    indices = {"i": 0, "e": 0}

    def generic(match: re.Match[str]) -> str:
        key = "i" if match[1] == "decoder.layers" else "e"
        indices[key] = int(match[2])
        return f"{match[1]}.{{{key}}}."

    template = _NUMBER.sub(generic, name)
    num_experts = 1 if model.moe is None else model.moe.num_experts
    for rule in FAMILIES[model.family].by_name.get(template, ()):
        inside = indices["i"] < model.num_layers and indices["e"] < num_experts
        if inside and rule.when(model) and rule.within(model, indices["i"]):
            return rule, indices
    raise ValueError(f"{name} is not a parameter of this {model.family} model")


_MIXTRAL_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def lora_target(piece: str) -> str:
    """Return a Hugging Face weight's name in `lora.targets`: its last part, Mixtral's w1-w3 under the common names."""
    last = piece.removesuffix(".weight").rpartition(".")[2]
    return _MIXTRAL_NAMES.get(last, last)


def lora_targets(model: ModelConfig) -> list[str]:
    """List the names that `lora.targets` may contain: all matrices of the layers except routers and gates."""
    experts = range(0 if model.moe is None else model.moe.num_experts)
    names = {
        lora_target(piece.name)
        for rule in FAMILIES[model.family].rules
        if any(rule.indices(model, range(model.num_layers), experts)) and "{i}" in rule.megatron
        for piece in rule.pieces
        if piece.is_whole
    }
    return sorted(name for name in names if "_proj" in name)
