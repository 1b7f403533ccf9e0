"""From a checkpoint's config.json to a ModelConfig, refusing whatever the Megatron model would compute differently."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import megalign.convert.families  # noqa: F401  (registers them)
from megalign.convert.config_file import ConfigFile, read_json
from megalign.convert.model_config import ModelConfig
from megalign.convert.quantised import quantisation
from megalign.convert.rope_config import read_rope, rope_section
from megalign.convert.rules import FAMILIES, Family
from megalign.schema import UserError

# Those of transformers, for all families, where a config.json leaves the field out.
COMMON_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}

MOST = 10_000  # layers, and experts
NOISE = ("attention_dropout", "resid_pdrop", "embd_pdrop", "router_jitter_noise")


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
    head_dim = _head_dim(config, num_heads)
    window, full_layers = family.window(config)
    switches = family.switches

    def flag(name: str) -> bool:
        source = switches.get(name, False)
        return source if isinstance(source, bool) else config.flag(source)

    cfg = ModelConfig(
        family=family.name,
        num_layers=config.whole("num_hidden_layers"),
        hidden_size=config.whole("hidden_size"),
        ffn_size=config.whole("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=config.whole("vocab_size"),
        max_positions=config.whole("max_position_embeddings"),
        norm_eps=config.number("rms_norm_eps"),
        rope=family.rope(config, head_dim)
        if family.rope
        else read_rope(config, rope_section(config), head_dim=head_dim),
        tied=config.flag("tie_word_embeddings"),
        sliding_window=window,
        full_layers=full_layers,
        qkv_bias=flag("qkv_bias"),
        out_bias=flag("out_bias"),
        mlp_bias=flag("mlp_bias"),
        qk_norm="head" if flag("qk_norm") else None,
        activation=_activation(config, family),
        moe=family.moe(config),
    )
    num_experts = 0 if cfg.moe is None else cfg.moe.num_experts
    for what, count in (("layers", cfg.num_layers), ("experts", num_experts)):
        if count > MOST:
            raise UserError(f"{path} asks for {count} {what}; allowed: at most {MOST}")
    return family.details(config, cfg)


def noise_left_out(hf_dir: Path) -> str:
    """Which noise of training a config.json asks for, in words, or nothing.

    None is ever applied, because both passes of a step must compute the same.
    """
    fields = read_json(Path(hf_dir) / "config.json")
    found = [f"{key} {fields[key]}" for key in NOISE if fields.get(key)]
    return f"not applied, though config.json asks for it: {', '.join(found)}" if found else ""


def _family(config: ConfigFile) -> Family:
    """By architecture, which also tells a language model from a classifier; by model_type where it is not written."""
    architectures = config.value("architectures")
    if not architectures:
        if config.value("model_type") not in FAMILIES:
            config.refuse("model_type", f"known: {', '.join(sorted(FAMILIES))}")
        return FAMILIES[config.value("model_type")]
    by_architecture = {family.architecture: family for family in FAMILIES.values()}
    known = isinstance(architectures, list) and [one for one in by_architecture if architectures == [one]]
    if not known:
        config.refuse("architectures", f"known: {', '.join(sorted(by_architecture))}")
    family = by_architecture[known[0]]
    if config.value("model_type") not in (None, family.name):
        config.refuse("model_type", f"{family.architecture} has {family.name!r}")
    return family


def _refuse_unsupported(config: ConfigFile) -> None:
    if config.value("compression_config") is not None:
        config.refuse("compression_config", "compressed checkpoints are not read; use the bfloat16 one")
    quantisation(config.path.parent)


def _activation(config: ConfigFile, family: Family) -> Literal["silu", "gelu_tanh", "clamped_swiglu"]:
    if family.activation == "clamped_swiglu":
        return "clamped_swiglu"
    if config.value(family.activation) in ("silu", "swish"):
        return "silu"
    if config.value(family.activation) == "gelu_pytorch_tanh":
        return "gelu_tanh"
    config.refuse(family.activation, "allowed: silu, gelu_pytorch_tanh")


def _head_dim(config: ConfigFile, num_heads: int) -> int:
    if config.value("qk_rope_head_dim") is not None:  # latent attention: older config.json have nothing more
        return config.whole("qk_rope_head_dim")
    if config.value("head_dim") is None:
        hidden_size = config.whole("hidden_size")
        if hidden_size % num_heads:
            config.refuse("num_attention_heads", f"it must divide hidden_size, {hidden_size}, where head_dim is absent")
        head_dim = hidden_size // num_heads
    else:
        head_dim = config.whole("head_dim")
    return head_dim
