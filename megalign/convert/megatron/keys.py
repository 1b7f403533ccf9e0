"""Maps Megatron parameters to their keys, indices and shapes in a checkpoint."""

from __future__ import annotations

import re

import torch

from megalign.convert.rules import find_rule
from megalign.model_config import ModelConfig

# In checkpoints Megatron uses TransformerEngine's names, which fuses a norm into the linear layer after it.
FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
# Layers for which Megatron saves an empty extra state, where TransformerEngine's layers save their FP8 state.
_WITH_STATE = re.compile(r"(.*\.linear_(?:qkv|proj|fc1|fc2|q_proj|q_up_proj|kv_up_proj))\.weight")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"(.*\.experts)\.local_experts\.(\d+)\.(.*)")


def checkpoint_key(name: str, model: ModelConfig) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Return (key, index, counts): a Megatron parameter is element `index` of the tensor `key` of a checkpoint.

    The layers of a dense model are stacked in one tensor, and so are the experts of a layer; counts: their number.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return name, (), ()
    layer, rest = int(match[1]), match[2]
    for norm, fused in FUSED_NORMS.items():
        rest = rest.replace(norm, fused) if rest.startswith(norm) else rest
    if model.moe is None:
        return f"decoder.layers.{rest}", (layer,), (model.num_layers,)
    expert = _EXPERT.fullmatch(f"decoder.layers.{layer}.{rest}")
    if expert is None:
        return f"decoder.layers.{layer}.{rest}", (), ()
    return f"{expert[1]}.experts.{expert[3]}", (int(expert[2]),), (model.moe.num_experts,)


def whole_shape(name: str, model: ModelConfig) -> tuple[int, ...]:
    """Return the shape of an unsharded Megatron parameter, vocabulary padding included."""
    rule, _ = find_rule(name, model)
    pieces = [torch.empty(piece.shape(model), device="meta") for piece in rule.pieces]
    shape = tuple(rule.layout.join(pieces, model).shape)
    return (model.padded_vocab_size, *shape[1:]) if rule.pieces[0].axes[0] == "vocab" else shape


def extra_state_of(name: str, model: ModelConfig) -> str | None:
    """Return the key of the empty extra state that Megatron saves beside a weight; None: it saves none."""
    match = _WITH_STATE.fullmatch(name)
    if match is None:
        return None
    key, index, counts = checkpoint_key(name, model)
    number, count = (index[0], counts[0]) if index else (0, 1)
    return f"{key.removesuffix('.weight')}._extra_state/shard_{number}_{count}"
