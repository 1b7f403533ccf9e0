"""Puts LoRA adapters on a transformers model through PEFT, and reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megalign.model_config import Lora
from megalign.models.adapter_values import initial_a

ADAPTER = "default"  # PEFT's name of the only adapter


def add(model: nn.Module, lora: Lora, *, seed: int) -> None:
    """Freeze a model and put adapters on its target layers: A drawn from the seed and the layer's name, B zero."""
    # Imported here: it takes a second, and jobs without adapters do not need it.
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), lora_dropout=0.0, bias="none"
    )
    inject_adapter_in_model(config, model, ADAPTER)
    with torch.no_grad():
        for name, layer in layers(model):
            a_RH = layer.lora_A[ADAPTER].weight
            a_RH.copy_(initial_a(a_RH.shape[0], a_RH.shape[1], f"{seed} {name}"))
            layer.lora_B[ADAPTER].weight.zero_()


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name of the linear layer, PEFT's layer around it) of every adapter."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def base_name(name: str) -> str:
    """Return the name that a tensor has in the model without adapters."""
    return name.replace(".base_layer.", ".")


def tensors(model: nn.Module, read: Callable[[Any], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (PEFT name, whole tensor) of every adapter's matrices."""
    for name, layer in layers(model):
        yield f"{name}.lora_A.weight", read(layer.lora_A[ADAPTER].weight)
        yield f"{name}.lora_B.weight", read(layer.lora_B[ADAPTER].weight)


def merging(model: nn.Module, read: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """Return `read` with adapters merged, in fp32, into the weights that they belong to."""
    by_weight = {layer.base_layer.weight: layer for _, layer in layers(model)}

    def read_merged(tensor: Any) -> Tensor:
        weight, layer = read(tensor), by_weight.get(tensor)
        if layer is None:
            return weight
        a_RH, b_VR = (read(matrix[ADAPTER].weight).float() for matrix in (layer.lora_A, layer.lora_B))
        return (weight.float() + layer.scaling[ADAPTER] * (b_VR @ a_RH)).to(weight.dtype)

    return read_merged


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """Disable the adapters inside the block."""
    adapted = [layer for _, layer in layers(model)]
    for layer in adapted:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in adapted:
            layer._disable_adapters = False
