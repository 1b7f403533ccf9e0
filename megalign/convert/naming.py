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


class Assembler:
    """Turns whole Megatron tensors, in any order, into Hugging Face ones, each as soon as all its parts have come."""

    def __init__(self, cfg: ModelConfig) -> None:
        self.cfg = cfg
        self.missing = _pieces_by_tensor(cfg)
        self.begun: dict[str, Tensor] = {}

    def add(self, name: str, full: Tensor) -> list[tuple[str, Tensor]]:
        """The tensors that `full` (what `unshard` gives) completes; none for the copy that a tied head is."""
        cfg = self.cfg
        rule, place = find_rule(name, cfg)
        if rule.copy:
            return []
        done = []
        for piece, tensor in zip(rule.pieces, rule.layout.split(full, cfg), strict=True):
            if tuple(tensor.shape) != piece.shape(cfg):
                raise ValueError(f"{name} gives {piece.name} of shape {tuple(tensor.shape)}, not {piece.shape(cfg)}")
            stored = piece.name.format(**place)
            if piece.is_whole:
                done.append((stored, tensor))
                continue
            if stored not in self.begun:
                self.begun[stored] = tensor.new_empty(piece.stored_shape(cfg))
            piece.view(self.begun[stored], place, cfg).copy_(tensor)
            self.missing[stored] -= 1
            if not self.missing[stored]:
                done.append((stored, self.begun.pop(stored)))
        return done


def _pieces_by_tensor(cfg: ModelConfig) -> Counter[str]:
    """How many pieces each Hugging Face tensor has that is more than one piece."""
    experts = range(0 if cfg.moe is None else cfg.moe.num_experts)
    return Counter(
        piece.name.format(**place)
        for rule in FAMILIES[cfg.family].rules
        if not rule.copy and not all(piece.is_whole for piece in rule.pieces)
        for place in rule.places(cfg, range(cfg.num_layers), experts)
        for piece in rule.pieces
    )


def hf_state(cfg: ModelConfig, named_full: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """A stream of whole Megatron tensors as a stream of Hugging Face ones."""
    assembler = Assembler(cfg)
    for name, full in named_full:
        yield from assembler.add(name, full)
    if assembler.begun:
        raise ValueError(f"parts of {', '.join(assembler.begun)} never came")
