"""Converts Granite: Llama with multipliers on embeddings, attention, residual stream and logits."""

from dataclasses import replace

from megalign.convert.families.llama import LLAMA
from megalign.convert.hf.config_json import ConfigFile
from megalign.convert.rules import Family, register
from megalign.model_config import ModelConfig


def details(hf: ConfigFile, model: ModelConfig) -> ModelConfig:
    """Add the multipliers of embeddings, attention, residual stream and logits."""
    return replace(
        model,
        embedding_scale=hf.number("embedding_multiplier"),
        attention_scale=hf.number("attention_multiplier"),
        residual_scale=hf.number("residual_multiplier"),
        logit_scale=1 / hf.number("logits_scaling"),
    )


GRANITE = register(
    Family(
        name="granite",
        architecture="GraniteForCausalLM",
        rules=LLAMA.rules,
        switches=LLAMA.switches,
        defaults={
            "max_position_embeddings": 2048,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        details=details,
        ignorable=LLAMA.ignorable,
    )
)
