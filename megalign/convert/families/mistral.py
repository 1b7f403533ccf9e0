"""Mistral: no biases; up to version 0.1 every layer attends inside a sliding window."""

from megalign.convert.config_file import ConfigFile
from megalign.convert.families.parts import ATTENTION, FIRST, LAST, MLP, NORMS, ROTARY_BUFFER
from megalign.convert.rules import Family, Window, register


def window(config: ConfigFile) -> Window:
    """The window of all layers; only an explicit null turns it off, as in transformers."""
    if config.value("sliding_window") is None:
        return None, ()
    if len(set(config.value("layer_types") or ())) > 1:
        config.refuse("layer_types", "only all layers or none may slide")
    return config.whole("sliding_window"), ()


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
