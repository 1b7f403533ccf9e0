"""Converts Mistral: no biases; a sliding window on all layers (up to version 0.1) or on some (Ministral)."""

from megalign.convert.families.parts import ATTENTION, FIRST, LAST, MLP, NORMS, ROTARY_BUFFER, windows
from megalign.convert.hf.config_json import ConfigFile
from megalign.convert.rules import Family, Window, register


def window_of_all(hf: ConfigFile) -> Window:
    """Return the sliding window of all layers; only an explicit null turns it off, as in transformers."""
    if hf.value("sliding_window") is None:
        return None, ()
    return hf.whole("sliding_window"), ()


def window(hf: ConfigFile) -> Window:
    """Return the sliding window by `layer_types` where present: transformers reads such a model as Ministral."""
    if hf.value("sliding_window") is None or hf.value("layer_types") is None:
        return window_of_all(hf)
    return windows(hf, lambda layer: True)


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
