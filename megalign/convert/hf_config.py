"""From a checkpoint's config.json to a ModelConfig, refusing whatever the Megatron model would compute differently."""

from __future__ import annotations

from pathlib import Path

import megalign.convert.families  # noqa: F401  (registers them)
from megalign.convert.config_file import ConfigFile, read_json
from megalign.convert.model_config import ModelConfig, RopeScaling
from megalign.convert.rules import FAMILIES, Family
from megalign.schema import UserError

# Those of transformers, for all families, where a config.json leaves the field out.
COMMON_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_dropout": 0.0}


def read_model_config(hf_dir: Path) -> ModelConfig:
    """The model that `hf_dir`/config.json describes, written by transformers 5 or older."""
    path = Path(hf_dir) / "config.json"
    raw = read_json(path)
    family = _family(ConfigFile(path, raw, {}))
    config = ConfigFile(path, raw, {**COMMON_DEFAULTS, **family.defaults})
    _refuse_unsupported(config)
    num_heads = config.whole("num_attention_heads")
    num_kv_heads = num_heads if config.value("num_key_value_heads") is None else config.whole("num_key_value_heads")
    if num_heads % num_kv_heads:
        config.refuse("num_key_value_heads", f"it must divide num_attention_heads, {num_heads}")
    rope_theta, rope_scaling = _rope(config)
    switches = family.switches

    def flag(name: str) -> bool:
        source = switches.get(name, False)
        return source if isinstance(source, bool) else config.flag(source)

    return ModelConfig(
        family=family.name,
        num_layers=config.whole("num_hidden_layers"),
        hidden_size=config.whole("hidden_size"),
        ffn_size=config.whole("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(config, num_heads),
        vocab_size=config.whole("vocab_size"),
        max_positions=config.whole("max_position_embeddings"),
        norm_eps=config.number("rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tied=config.flag("tie_word_embeddings"),
        sliding_window=family.window(config),
        qkv_bias=flag("qkv_bias"),
        out_bias=flag("out_bias"),
        mlp_bias=flag("mlp_bias"),
        qk_norm=flag("qk_norm"),
        moe=family.moe(config),
    )


def _family(config: ConfigFile) -> Family:
    """By architecture, which also tells a language model from a classifier; by model_type where it is not written."""
    architectures = config.value("architectures")
    if not architectures:
        if config.value("model_type") not in FAMILIES:
            config.refuse("model_type", f"known: {', '.join(sorted(FAMILIES))}")
        return FAMILIES[config.value("model_type")]
    by_architecture = {family.architecture: family for family in FAMILIES.values()}
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in by_architecture:
        config.refuse("architectures", f"known: {', '.join(sorted(by_architecture))}")
    family = by_architecture[architectures[0]]
    if config.value("model_type") not in (None, family.name):
        config.refuse("model_type", f"{family.architecture} has {family.name!r}")
    return family


def _refuse_unsupported(config: ConfigFile) -> None:
    if config.value("hidden_act") != "silu":
        config.refuse("hidden_act", "allowed: silu")
    if config.value("attention_dropout"):
        config.refuse("attention_dropout", "allowed: 0 (both passes of a step must compute the same)")
    for key in ("quantization_config", "compression_config"):
        if config.value(key) is not None:
            config.refuse(key, "quantised checkpoints are not read; use the float32, bfloat16 or float16 one")


def _head_dim(config: ConfigFile, num_heads: int) -> int:
    if config.value("head_dim") is None:
        hidden_size = config.whole("hidden_size")
        if hidden_size % num_heads:
            config.refuse("num_attention_heads", f"it must divide hidden_size, {hidden_size}, where head_dim is absent")
        head_dim = hidden_size // num_heads
    else:
        head_dim = config.whole("head_dim")
    if head_dim % 2:
        raise UserError(f"{config.path}: head_dim is {head_dim}; rotary positions need an even one")
    return head_dim


def _rope(config: ConfigFile) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    Where several are written the order is that of transformers: rope_scaling, rope_parameters, rope_theta.
    """
    key = "rope_scaling" if config.value("rope_scaling") else "rope_parameters"
    if not config.value(key):
        _refuse_partial(config)
        return config.number("rope_theta"), None
    rope = config.section(key)
    theta = rope.number("rope_theta") if rope.value("rope_theta") is not None else config.number("rope_theta")
    _refuse_partial(config if rope.value("partial_rotary_factor") is None else rope)
    kind_key = "rope_type" if "rope_type" in rope.fields else "type"
    kind = rope.value(kind_key)
    if kind in (None, "default") and any(isinstance(value, dict) for value in rope.fields.values()):
        config.refuse(key, "parameters by layer type are not supported; allowed: one set for all layers")
    if kind in (None, "default"):
        return theta, None
    if kind != "llama3":
        rope.refuse(kind_key, "allowed: default, llama3")
    original = "original_max_position_embeddings"
    holder = config if config.value(original) is not None or rope.value(original) is None else rope
    scaling = RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_positions=holder.whole(
            original if holder.value(original) is not None else "max_position_embeddings"
        ),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        rope.refuse("high_freq_factor", f"it must be above low_freq_factor, {scaling.low_freq_factor}")
    return theta, scaling


def _refuse_partial(holder: ConfigFile) -> None:
    if holder.value("partial_rotary_factor") not in (None, 1, 1.0):
        holder.refuse("partial_rotary_factor", "allowed: 1.0 (all of a head is rotated)")
