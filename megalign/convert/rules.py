"""How tensors of a Hugging Face checkpoint become Megatron's and back: one rule, read in both directions.

A rule joins whole Hugging Face tensors ("pieces") into one Megatron tensor. Tensor parallelism cuts every piece into
equal contiguous parts along the rule's `tp_dim` first and joins afterwards, so one rule serves every size: Megatron's
interleaving of query, key and value, or of gate and up rows, is the same on a part as on the whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from megalign.convert.config_file import ConfigFile
from megalign.convert.model_config import ModelConfig, MoeConfig, Rope

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


Window = tuple[int | None, tuple[int, ...]]  # positions that layers see, and which layers see all nevertheless


def axis_size(axis: Axis, cfg: ModelConfig) -> int:
    if cfg.moe is not None and axis in ("experts", "expert_ffn", "shared_ffn"):
        moe = cfg.moe
        return {"experts": moe.num_experts, "expert_ffn": moe.ffn_size, "shared_ffn": moe.shared_ffn_size}[axis]
    if cfg.latent is not None and axis in ("query_rank", "latent_rank", "latent_and_rope", "latent_key_value"):
        latent = cfg.latent
        return {
            "query_rank": latent.query_rank or 0,
            "latent_rank": latent.rank,
            "latent_and_rope": latent.rank + cfg.rope.dim,
            "latent_key_value": cfg.num_heads * (latent.nope_dim + latent.value_dim),
        }[axis]
    return {
        "one": 1,
        "vocab": cfg.vocab_size,
        "hidden": cfg.hidden_size,
        "ffn": cfg.ffn_size,
        "query": cfg.num_heads * cfg.head_dim,
        "key_value": cfg.num_kv_heads * cfg.head_dim,
        "head_dim": cfg.head_dim,
        "heads": cfg.num_heads,
        "latent_query": cfg.num_heads * cfg.key_dim,
        "latent_value": cfg.num_heads * cfg.value_dim,
    }[axis]


@dataclass(frozen=True, slots=True)
class Piece:
    """A matrix or vector of the model, what its dimensions run over, and where it lies in a Hugging Face tensor.

    Mostly it is the whole tensor. Some families store several in one, or with rows and columns swapped.
    """

    name: str
    axes: tuple[Axis, ...]
    rows: tuple[Axis, ...] = ()  # what the tensor holds below each other; empty: this piece alone
    block: int = 0  # which of them this is
    every: int = 1  # of rows that take turns this is each `every`-th, from `block` on
    of_experts: bool = False  # the tensor stacks those of all experts
    transposed: bool = False

    def shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        return tuple(axis_size(axis, cfg) for axis in self.axes)

    @property
    def is_whole(self) -> bool:
        """Whether the Hugging Face tensor is this piece and nothing more."""
        return not self.rows and self.every == 1 and not self.of_experts and not self.transposed

    def stored_shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        """Of the Hugging Face tensor."""
        first, *others = self.shape(cfg)
        first = sum(axis_size(axis, cfg) for axis in self.rows) if self.rows else first * self.every
        shape = (*others, first) if self.transposed else (first, *others)
        return (axis_size("experts", cfg), *shape) if self.of_experts else shape

    def view(self, stored: Tensor, place: Mapping[str, int], cfg: ModelConfig) -> Tensor:
        """This piece as a view of the Hugging Face tensor: to read it from, or to write it to."""
        return self.view_of_one(stored[place["e"]] if self.of_experts else stored, cfg)

    def view_of_one(self, found: Tensor, cfg: ModelConfig) -> Tensor:
        """The same, of a single expert's part of the tensor where it stacks those of all."""
        found = found.movedim(-1, 0) if self.transposed else found
        if self.rows:
            sizes = [axis_size(axis, cfg) for axis in self.rows]
            found = found.split(sizes)[self.block]
        return found if self.every == 1 else found[self.block :: self.every]


@dataclass(frozen=True, slots=True)
class Layout:
    """How Megatron lays a rule's pieces into one tensor: runs of their rows, `blocks`, in its order.

    `split` undoes `join`, on parts as on wholes.
    """

    blocks: Callable[[Sequence[Tensor], ModelConfig], Sequence[Tensor]]
    split: Callable[[Tensor, ModelConfig], Sequence[Tensor]]

    def join(self, pieces: Sequence[Tensor], cfg: ModelConfig) -> Tensor:
        """The Megatron tensor; a view where it is one piece."""
        blocks = self.blocks(pieces, cfg)
        return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks))


def _qkv_blocks(pieces: Sequence[Tensor], cfg: ModelConfig) -> Sequence[Tensor]:
    """[query rows, ...], [key rows, ...], [value rows, ...] -> by key-value group: its queries, its key, its value."""
    num_groups = pieces[1].shape[0] // cfg.head_dim
    grouped = [piece.chunk(num_groups) for piece in pieces]
    return [rows for group in zip(*grouped, strict=True) for rows in group]


def _split_qkv(tensor: Tensor, cfg: ModelConfig) -> Sequence[Tensor]:
    rows = [cfg.num_heads // cfg.num_kv_heads * cfg.head_dim, cfg.head_dim, cfg.head_dim]
    grouped = tensor.reshape(-1, sum(rows), *tensor.shape[1:])
    return [piece.flatten(0, 1) for piece in grouped.split(rows, dim=1)]


WHOLE = Layout(blocks=lambda pieces, cfg: pieces, split=lambda tensor, cfg: [tensor])
STACK2 = Layout(blocks=lambda pieces, cfg: pieces, split=lambda tensor, cfg: tensor.chunk(2))
QKV = Layout(blocks=_qkv_blocks, split=_split_qkv)


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
    dtype: torch.dtype | None = None  # it has whatever the model's is

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
    window: Callable[[ConfigFile], Window] = lambda config: (None, ())
    rope: Callable[[ConfigFile, int], Rope] | None = None  # from config.json and head_dim, where it is unusual
    moe: Callable[[ConfigFile], MoeConfig | None] = lambda config: None
    details: Callable[[ConfigFile, ModelConfig], ModelConfig] = lambda config, cfg: cfg  # all else that it has
    activation: str = "hidden_act"  # config.json's field
    ignorable: tuple[str, ...] = ()  # regular expressions: stored by some writers, computed by every reader
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
        if piece.is_whole
    }
    return sorted(name for name in found if "_proj" in name)
