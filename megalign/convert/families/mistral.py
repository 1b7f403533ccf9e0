"""Mistral: no biases; up to version 0.1 every layer attends inside a sliding window, in Ministral some do."""

from megalign.convert.config_file import ConfigFile
from megalign.convert.families.parts import ATTENTION, FIRST, LAST, MLP, NORMS, ROTARY_BUFFER, windows
from megalign.convert.rules import Family, Window, register


def window_of_all(config: ConfigFile) -> Window:
    """The window of all layers; only an explicit null turns it off, as in transformers."""
    if config.value("sliding_window") is None:
        return None, ()
    return config.whole("sliding_window"), ()


def window(config: ConfigFile) -> Window:
    """By `layer_types` where they are written: transformers takes such a model for Ministral."""
    if config.value("sliding_window") is None or config.value("layer_types") is None:
        return window_of_all(config)
    return windows(config, lambda layer: True)


MISTRAL = register(
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        rules=FIRST + NORMS + ATTENTION + MLP + LAST,
        switches={},
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        window=window,
        ignorable=(ROTARY_BUFFER,),
    )
)
MINISTRAL = register(
    Family(
        name="ministral",
        architecture="MinistralForCausalLM",
        rules=MISTRAL.rules,
        switches={},
        defaults=MISTRAL.defaults,
        window=window,
        ignorable=MISTRAL.ignorable,
    )
)
