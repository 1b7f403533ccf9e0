"""Mixtral: every layer routes to experts; their shares sum to one."""

from megalign.convert.config_file import ConfigFile
from megalign.convert.families.mistral import window_of_all
from megalign.convert.families.parts import ATTENTION, FIRST, LAST, NORMS, ROTARY_BUFFER, experts, moe_config
from megalign.convert.model_config import MoeConfig
from megalign.convert.rules import Family, Window, register


def window(config: ConfigFile) -> Window:
    """The window of all layers."""
    if len(set(config.value("layer_types") or ())) > 1:
        config.refuse("layer_types", "only all layers or none may slide")
    return window_of_all(config)


def moe(config: ConfigFile) -> MoeConfig:
    """The experts; `intermediate_size` is that of one of them."""
    return moe_config(config, ffn="intermediate_size", normalize=True)


MIXTRAL = register(
    Family(
        name="mixtral",
        architecture="MixtralForCausalLM",
        rules=FIRST + NORMS + ATTENTION + experts("block_sparse_moe", gate="w1", up="w3", down="w2") + LAST,
        switches={},
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-5,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
        window=window,
        moe=moe,
        ignorable=(ROTARY_BUFFER,),
    )
)
