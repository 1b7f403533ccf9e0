"""Converts Mixtral: every layer has experts, and routing weights are normalised to sum to one."""

from megalign.convert.families.mistral import window_of_all
from megalign.convert.families.parts import ATTENTION, FIRST, LAST, NORMS, ROTARY_BUFFER, experts, moe_config
from megalign.convert.hf.config_json import ConfigFile
from megalign.convert.rules import Family, Window, register
from megalign.model_config import MoeConfig


def window(hf: ConfigFile) -> Window:
    """Return the sliding window of all layers."""
    if len(set(hf.value("layer_types") or ())) > 1:
        hf.refuse("layer_types", "must be the same for all layers")
    return window_of_all(hf)


def moe(hf: ConfigFile) -> MoeConfig:
    """Read the experts' configuration; `intermediate_size` is the size of one expert."""
    return moe_config(hf, ffn="intermediate_size", normalize=True)


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
