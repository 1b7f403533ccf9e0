"""Converts SmolLM3: Llama in which every fourth layer has no rotary embedding (NoPE)."""

from dataclasses import replace

from megalign.convert.families.llama import LLAMA
from megalign.convert.families.parts import windows
from megalign.convert.hf.config_json import ConfigFile
from megalign.convert.rules import Family, Window, register
from megalign.model_config import ModelConfig


def no_rope_layers(hf: ConfigFile) -> tuple[int, ...]:
    """Return the layers without rotary embedding; in `no_rope_layers` they have 0, the others 1."""
    listed, num_layers = hf.value("no_rope_layers"), hf.whole("num_hidden_layers")
    if listed is None:
        interval = hf.whole("no_rope_layer_interval")
        return tuple(layer for layer in range(num_layers) if (layer + 1) % interval == 0)
    if not isinstance(listed, list) or len(listed) != num_layers or not set(listed) <= {0, 1}:
        hf.refuse("no_rope_layers", f"must be 1 (rotary) or 0 (NoPE) for each of {num_layers} layers")
    return tuple(layer for layer, has in enumerate(listed) if not has)


def window(hf: ConfigFile) -> Window:
    """Return the sliding window, if `use_sliding_window`: on the layers of `layer_types`, else on NoPE layers."""
    if "sliding_attention" in (hf.value("layer_types") or ()) and not hf.flag("use_sliding_window"):
        hf.refuse("use_sliding_window", "must be true, for layer_types has sliding_attention")
    if not hf.flag("use_sliding_window") or hf.value("sliding_window") is None:
        return None, ()
    without = no_rope_layers(hf)
    return windows(hf, lambda layer: layer in without)


def details(hf: ConfigFile, model: ModelConfig) -> ModelConfig:
    """Add the layers without rotary embedding."""
    return replace(model, no_rope_layers=no_rope_layers(hf))


SMOLLM3 = register(
    Family(
        name="smollm3",
        architecture="SmolLM3ForCausalLM",
        rules=LLAMA.rules,
        switches=LLAMA.switches,
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2000000.0,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
        },
        window=window,
        details=details,
    )
)
