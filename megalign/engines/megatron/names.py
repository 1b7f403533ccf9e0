"""Names a rank's Megatron parameters by the global numbers of layers and experts."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from megalign.models.gpt import PolicyModel

# TransformerEngine fuses a norm into the linear layer behind it; in the conversion tables it is a module of its own.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
EXPERT = re.compile(r"(.*\.experts\.local_experts\.)(\d+)(\..*)")
PEFT_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")


def named_parameters(chunks: Sequence[PolicyModel], first_expert: int) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of some of a rank's chunks by global name, without adapters.

    first_expert: the global number of the first expert on the rank.
    """
    named = {}
    for chunk in chunks:
        layers = chunk.layer_numbers
        for name, parameter in chunk.named_parameters():
            if name.startswith("adapters."):
                continue
            if name.startswith("decoder.layers."):
                _, _, local, rest = name.split(".", 3)
                name = f"decoder.layers.{layers[int(local)]}.{FUSED_NORMS.get(rest, rest)}"
            match = EXPERT.match(name)
            if match is not None:
                name = expert_name(match, int(match[2]) + first_expert)
            named[name] = parameter
    return named


def linear_layers(chunk: PolicyModel, first_expert: int) -> dict[str, torch.nn.Module]:
    """Return a chunk's linear layers by the global name of their weight; embedding and head are not among them."""
    names = {id(parameter): name for name, parameter in named_parameters([chunk], first_expert).items()}
    layers = {}
    for module in chunk.decoder.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and weight.dim() == 2:
            layers[names[id(weight)]] = module
    return layers


def expert_name(match: re.Match[str], number: int) -> str:
    """Return a matched name with another expert's number."""
    return f"{match[1]}{number}{match[3]}"
