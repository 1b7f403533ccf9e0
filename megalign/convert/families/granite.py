"""Granite: Llama with multipliers on embeddings, attention, residual stream and logits."""

from dataclasses import replace

from megalign.convert.config_file import ConfigFile
from megalign.convert.families.llama import LLAMA
from megalign.convert.model_config import ModelConfig
from megalign.convert.rules import Family, register


def details(config: ConfigFile, cfg: ModelConfig) -> ModelConfig:
    """The multipliers."""
    return replace(
        cfg,
        embedding_scale=config.number("embedding_multiplier"),
        attention_scale=config.number("attention_multiplier"),
        residual_scale=config.number("residual_multiplier"),
        logit_scale=1 / config.number("logits_scaling"),
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
