"""Adapters in PEFT's own format, beside the Hugging Face checkpoint that has them merged."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from megalign.convert import HFWriter
from megalign.engines.engine import Engine
from megalign.models.lora import Lora

OF_EXPERT = re.compile(r"\.experts\.\d+\.")


def add_adapter(writer: HFWriter, engine: Engine, lora: Lora) -> bool:
    """Add `adapter/` to an export, called on rank 0 while the others run through `adapter_tensors`; whether it could.

    PEFT has no place for adapters of single experts, which transformers stacks: then the merged weights are all.
    """
    tensors: dict[str, Tensor] = {}
    possible = True
    for name, tensor in engine.adapter_tensors():
        possible = possible and not OF_EXPERT.search(name)
        if possible:
            tensors[f"base_model.model.{name}"] = tensor.cpu().clone()
    if possible:
        writer.add_adapter(tensors, adapter_config(lora, base=str(writer.source)))
    return possible


def adapter_config(lora: Lora, *, base: str) -> dict[str, Any]:
    """What PEFT's `LoraConfig` reads."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
