"""Lists Megatron parameter names, and turns Megatron shards back into Hugging Face tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

import megalign.convert.families  # noqa: F401  (registers them)
from megalign.convert.rules import FAMILIES, Piece, find_rule
from megalign.model_config import ModelConfig


def megatron_names(
    model: ModelConfig, *, layers: Iterable[int], first: bool, last: bool, experts: Sequence[int] | None = None
) -> list[str]:
    """List the parameter names of one pipeline stage and expert-parallel rank, with global layer and expert numbers.

    The stage holds `layers`, the embedding if `first`, the head if `last`, and of each layer `experts` (None: all). A
    tied head is listed where the stage holds no embedding to share.
    """
    held = range(0 if model.moe is None else model.moe.num_experts) if experts is None else experts
    names = ["embedding.word_embeddings.weight"] if first else []
    for layer in layers:
        for rule in FAMILIES[model.family].rules:
            if "{i}" in rule.megatron:
                names += [rule.megatron.format(**indices) for indices in rule.indices(model, (layer,), held)]
    if last:
        names.append("decoder.final_layernorm.weight")
        names += [] if model.tied and first else ["output_layer.weight"]
    return names


def unshard(name: str, parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Join the tensor-parallel shards of a Megatron tensor, in rank order, and drop the vocabulary padding."""
    rule, _ = find_rule(name, model)
    if rule.tp_dim is None:
        return parts[0]
    by_part = [rule.layout.split(part, model) for part in parts]
    wholes = []
    for number, piece in enumerate(rule.pieces):
        whole = torch.cat([pieces[number] for pieces in by_part], dim=rule.tp_dim)
        wholes.append(whole[: model.vocab_size] if piece.axes[0] == "vocab" else whole)
    return rule.layout.join(wholes, model)


def shard(name: str, stored: Callable[[str], Tensor], model: ModelConfig, *, tp_rank: int, tp_size: int) -> Tensor:
    """Return a tensor-parallel rank's shard of a Megatron tensor; vocabulary padding rows are zero.

    stored: gives the Hugging Face tensors that it is made of, by name.
    """
    rule, indices = find_rule(name, model)
    pieces = [piece.view(stored(piece.name.format(**indices)), indices, model) for piece in rule.pieces]
    parts = [
        shard_piece(whole, piece, model, rule.tp_dim, tp_rank, tp_size)
        for whole, piece in zip(pieces, rule.pieces, strict=True)
    ]
    return rule.layout.join(parts, model)


def shard_piece(
    whole: Tensor, piece: Piece, model: ModelConfig, tp_dim: int | None, tp_rank: int, tp_size: int
) -> Tensor:
    """Return a rank's rows or columns of a piece, after padding the vocabulary."""
    if tp_dim is None:
        return whole
    size = whole.shape[tp_dim]
    padded = model.padded_vocab_size if piece.axes[tp_dim] == "vocab" else size
    width = padded // tp_size
    start, stop = min(tp_rank * width, size), min((tp_rank + 1) * width, size)
    mine = whole.narrow(tp_dim, start, stop - start)
    if stop - start == width:
        return mine
    part = whole.new_zeros([width if dim == tp_dim else length for dim, length in enumerate(whole.shape)])
    part.narrow(tp_dim, 0, stop - start).copy_(mine)
    return part


def hf_parts(name: str, full: Tensor, model: ModelConfig) -> list[tuple[str, int | None, Tensor]]:
    """Split an unsharded Megatron tensor (from `unshard`) into (Hugging Face name, expert, tensor).

    Of a Hugging Face tensor that stacks all experts, only the given expert's row is returned; otherwise expert is None
    and the tensor is whole. Empty for a tied head, which copies the embedding. ValueError for a wrong shape.
    """
    rule, indices = find_rule(name, model)
    if rule.copy:
        return []
    parts: list[tuple[str, int | None, Tensor]] = []
    shared: dict[str, Tensor] = {}
    filled: Counter[str] = Counter()
    for piece, tensor in zip(rule.pieces, rule.layout.split(full, model), strict=True):
        if tuple(tensor.shape) != piece.shape(model):
            raise ValueError(f"{name} gives {piece.name} of shape {tuple(tensor.shape)}, not {piece.shape(model)}")
        stored = piece.name.format(**indices)
        if piece.is_whole:
            parts.append((stored, None, tensor))
            continue
        if stored not in shared:
            shape = piece.stored_shape(model)
            shared[stored] = tensor.new_empty(shape[1:] if piece.of_experts else shape)
            parts.append((stored, indices["e"] if piece.of_experts else None, shared[stored]))
        piece.view_of_expert(shared[stored], model).copy_(tensor)
        filled[stored] += tensor.numel()
    for stored, tensor in shared.items():
        if filled[stored] != tensor.numel():
            raise ValueError(f"{name} fills {filled[stored]} of {tensor.numel()} values of {stored}")
    return parts


def hf_state(model: ModelConfig, named_full: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Turn a stream of unsharded Megatron tensors, in any order, into a stream of whole Hugging Face tensors."""
    begun: dict[str, tuple[Tensor, set[int]]] = {}
    for name, full in named_full:
        for stored, expert, tensor in hf_parts(name, full, model):
            if expert is None:
                yield stored, tensor
                continue
            assert model.moe is not None
            whole, seen = begun.setdefault(stored, (tensor.new_empty(model.moe.num_experts, *tensor.shape), set()))
            whole[expert] = tensor
            seen.add(expert)
            if len(seen) == model.moe.num_experts:
                yield stored, begun.pop(stored)[0]
    if begun:
        raise ValueError(f"parts of {', '.join(begun)} never came")
