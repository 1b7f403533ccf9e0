"""SmolLM3: Llama in which every fourth layer has no positions."""

from dataclasses import replace

from megalign.convert.config_file import ConfigFile
from megalign.convert.families.llama import LLAMA
from megalign.convert.families.parts import windows
from megalign.convert.model_config import ModelConfig
from megalign.convert.rules import Family, Window, register


def no_rope_layers(config: ConfigFile) -> tuple[int, ...]:
    """Layers without positions: transformers writes 0 for them and 1 for the others."""
    listed, num_layers = config.value("no_rope_layers"), config.whole("num_hidden_layers")
    if listed is None:
        interval = config.whole("no_rope_layer_interval")
        return tuple(layer for layer in range(num_layers) if (layer + 1) % interval == 0)
    if not isinstance(listed, list) or len(listed) != num_layers or not set(listed) <= {0, 1}:
        config.refuse("no_rope_layers", f"needed: 1 (positions) or 0 (none) for each of {num_layers} layers")
    return tuple(layer for layer, has in enumerate(listed) if not has)


def window(config: ConfigFile) -> Window:
    """Behind a switch; layers without positions slide, where `layer_types` says nothing else."""
    if "sliding_attention" in (config.value("layer_types") or ()) and not config.flag("use_sliding_window"):
        config.refuse("use_sliding_window", "needed: true, for layer_types has sliding_attention")
    if not config.flag("use_sliding_window") or config.value("sliding_window") is None:
        return None, ()
    without = no_rope_layers(config)
    return windows(config, lambda layer: layer in without)


def details(config: ConfigFile, cfg: ModelConfig) -> ModelConfig:
    """Which layers have no positions."""
    return replace(cfg, no_rope_layers=no_rope_layers(config))


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
