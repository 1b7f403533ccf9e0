"""Which parameters a part of the model has, and their way back from Megatron's names and shards to Hugging Face's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

import megalign.convert.families  # noqa: F401  (registers them)
from megalign.convert.model_config import ModelConfig
from megalign.convert.rules import FAMILIES, find_rule


def megatron_names(
    cfg: ModelConfig, *, layers: Iterable[int], first: bool, last: bool, experts: Sequence[int] | None = None
) -> list[str]:
    """Parameter names, with global numbers, of a stage that holds `layers`, the embedding if `first`, the head if
    `last`, and of `experts` (all where it is None). A tied head is listed where its stage has no embedding to share."""
    held = range(0 if cfg.moe is None else cfg.moe.num_experts) if experts is None else experts
    names = ["embedding.word_embeddings.weight"] if first else []
    for layer in layers:
        for rule in FAMILIES[cfg.family].rules:
            if "{i}" in rule.megatron:
                names += [rule.megatron.format(**place) for place in rule.places(cfg, (layer,), held)]
    if last:
        names.append("decoder.final_layernorm.weight")
        names += [] if cfg.tied and first else ["output_layer.weight"]
    return names


def unshard(name: str, parts: Sequence[Tensor], cfg: ModelConfig) -> Tensor:
    """The whole Megatron tensor, without the vocabulary's padding, from all tensor-parallel parts in order of rank."""
    rule, _ = find_rule(name, cfg)
    if rule.tp_dim is None:
        return parts[0]
    by_part = [rule.layout.split(part, cfg) for part in parts]
    wholes = []
    for number, piece in enumerate(rule.pieces):
        whole = torch.cat([pieces[number] for pieces in by_part], dim=rule.tp_dim)
        wholes.append(whole[: cfg.vocab_size] if piece.axes[0] == "vocab" else whole)
    return rule.layout.join(wholes, cfg)


def hf_parts(name: str, full: Tensor, cfg: ModelConfig) -> list[tuple[str, int | None, Tensor]]:
    """(Hugging Face tensor, expert, values) of all that a whole Megatron tensor (what `unshard` gives) becomes.

    Tensors that stack all experts come an expert at a time; elsewhere expert is None and the tensor whole. None for the
    copy that a tied head is. ValueError where a shape is not the model's.
    """
    rule, place = find_rule(name, cfg)
    if rule.copy:
        return []
    done: list[tuple[str, int | None, Tensor]] = []
    shared: dict[str, Tensor] = {}
    filled: Counter[str] = Counter()
    for piece, tensor in zip(rule.pieces, rule.layout.split(full, cfg), strict=True):
        if tuple(tensor.shape) != piece.shape(cfg):
            raise ValueError(f"{name} gives {piece.name} of shape {tuple(tensor.shape)}, not {piece.shape(cfg)}")
        stored = piece.name.format(**place)
        if piece.is_whole:
            done.append((stored, None, tensor))
            continue
        if stored not in shared:
            shape = piece.stored_shape(cfg)
            shared[stored] = tensor.new_empty(shape[1:] if piece.of_experts else shape)
            done.append((stored, place["e"] if piece.of_experts else None, shared[stored]))
        piece.view_of_one(shared[stored], cfg).copy_(tensor)
        filled[stored] += tensor.numel()
    for stored, tensor in shared.items():
        if filled[stored] != tensor.numel():
            raise ValueError(f"{name} fills {filled[stored]} of {tensor.numel()} values of {stored}")
    return done


def hf_state(cfg: ModelConfig, named_full: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """A stream of whole Megatron tensors, in any order, as a stream of whole Hugging Face ones."""
    begun: dict[str, tuple[Tensor, set[int]]] = {}
    for name, full in named_full:
        for stored, expert, tensor in hf_parts(name, full, cfg):
            if expert is None:
                yield stored, tensor
                continue
            assert cfg.moe is not None
            whole, seen = begun.setdefault(stored, (tensor.new_empty(cfg.moe.num_experts, *tensor.shape), set()))
            whole[expert] = tensor
            seen.add(expert)
            if len(seen) == cfg.moe.num_experts:
                yield stored, begun.pop(stored)[0]
    if begun:
        raise ValueError(f"parts of {', '.join(begun)} never came")
