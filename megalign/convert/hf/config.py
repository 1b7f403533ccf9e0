"""Reads config.json into a ModelConfig, and refuses settings that the Megatron model would compute differently."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import megalign.convert.families  # noqa: F401  (registers them)
from megalign.convert.hf.config_json import ConfigFile, read_json
from megalign.convert.hf.quantised import quantisation
from megalign.convert.hf.rope import read_rope, rope_section
from megalign.convert.rules import FAMILIES, Family
from megalign.model_config import ModelConfig
from megalign.schema import UserError

# transformers' defaults, for all families, of fields missing in a config.json.
COMMON_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}

MOST = 10_000  # largest number of layers, and of experts
# Names of fields, and of attributes of transformers' modules, that are the probability or size of noise in training.
NOISE = re.compile(
    r"(?!classifier|summary|seq_classif|pooler|qa_)\w*(dropout|pdrop|drop_path|layer_?drop|jitter)(_\w*)?|drop_prob"
)
NOT_NOISE = {"phimoe": "router_jitter_noise"}  # by model type: a threshold for choosing experts, without noise too


def read_model_config(hf_dir: Path) -> ModelConfig:
    """Read `hf_dir`/config.json, as transformers 5 or older writes it, into a ModelConfig."""
    path = Path(hf_dir) / "config.json"
    return model_config_of(path, read_json(path))


def model_config_of(path: Path, raw: Mapping[str, Any]) -> ModelConfig:
    """Return the ModelConfig of a parsed config.json; `path` is its file, for errors."""
    family = _family(ConfigFile(path, raw, {}))
    hf = ConfigFile(path, raw, {**COMMON_DEFAULTS, **family.defaults})
    refuse_compressed(path, raw)
    quantisation(path, raw)
    num_heads = hf.whole("num_attention_heads")
    num_kv_heads = num_heads if hf.value("num_key_value_heads") is None else hf.whole("num_key_value_heads")
    if num_heads % num_kv_heads:
        hf.refuse("num_key_value_heads", f"must divide num_attention_heads, {num_heads}")
    head_dim = _head_dim(hf, num_heads)
    window, full_layers = family.window(hf)
    switches = family.switches

    def flag(name: str) -> bool:
        source = switches.get(name, False)
        return source if isinstance(source, bool) else hf.flag(source)

    model = ModelConfig(
        family=family.name,
        num_layers=hf.whole("num_hidden_layers"),
        hidden_size=hf.whole("hidden_size"),
        ffn_size=hf.whole("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=hf.whole("vocab_size"),
        max_positions=hf.whole("max_position_embeddings"),
        norm_eps=hf.number("rms_norm_eps"),
        rope=family.rope(hf, head_dim) if family.rope else read_rope(hf, rope_section(hf), head_dim=head_dim),
        tied=hf.flag("tie_word_embeddings"),
        sliding_window=window,
        full_layers=full_layers,
        qkv_bias=flag("qkv_bias"),
        out_bias=flag("out_bias"),
        mlp_bias=flag("mlp_bias"),
        qk_norm="head" if flag("qk_norm") else None,
        activation=_activation(hf, family),
        moe=family.moe(hf),
    )
    num_experts = 0 if model.moe is None else model.moe.num_experts
    for what, count in (("layers", model.num_layers), ("experts", num_experts)):
        if count > MOST:
            raise UserError(f"{path} asks for {count} {what}; must be at most {MOST}")
    return family.details(hf, model)


def noise_left_out(hf: Mapping[str, Any]) -> str:
    """Return a message that names the dropout and router noise a config.json asks for; "" where it asks for none.

    Noise is never applied, because both passes of a training step must compute the same log-probs.
    """
    sections = [hf, *(value for value in hf.values() if isinstance(value, dict))]
    kind = hf.get("model_type")
    asked = [f"{key} {value}" for fields in sections for key, value in fields.items() if is_noise(kind, key, value)]
    return f"not applied, though config.json asks for it: {', '.join(asked)}" if asked else ""


def is_noise(model_type: Any, name: str, value: Any) -> bool:
    """Return whether a field of a configuration or a module sets noise in training, and sets it to more than 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and value > 0 and NOISE.fullmatch(name) is not None and NOT_NOISE.get(model_type) != name


def _family(hf: ConfigFile) -> Family:
    """Return the family named by `architectures`, or by `model_type` where that is missing.

    Only `architectures` distinguishes language models from classifiers.
    """
    architectures = hf.value("architectures")
    if not architectures:
        if hf.value("model_type") not in FAMILIES:
            hf.refuse("model_type", f"must be one of {', '.join(sorted(FAMILIES))}")
        return FAMILIES[hf.value("model_type")]
    by_architecture = {family.architecture: family for family in FAMILIES.values()}
    known = isinstance(architectures, list) and [name for name in by_architecture if architectures == [name]]
    if not known:
        hf.refuse("architectures", f"must be one of {', '.join(sorted(by_architecture))}")
    family = by_architecture[known[0]]
    if hf.value("model_type") not in (None, family.name):
        hf.refuse("model_type", f"{family.architecture} has {family.name!r}")
    return family


def refuse_compressed(path: Path, raw: Mapping[str, Any]) -> None:
    """Raise UserError for the config.json of a compressed checkpoint."""
    if raw.get("compression_config") is not None:
        ConfigFile(path, raw, {}).refuse(
            "compression_config", "compressed checkpoints are not read; use the bfloat16 one"
        )


def _activation(hf: ConfigFile, family: Family) -> Literal["silu", "gelu_tanh", "clamped_swiglu"]:
    if family.activation == "clamped_swiglu":
        return "clamped_swiglu"
    if hf.value(family.activation) in ("silu", "swish"):
        return "silu"
    if hf.value(family.activation) == "gelu_pytorch_tanh":
        return "gelu_tanh"
    hf.refuse(family.activation, "must be silu or gelu_pytorch_tanh")


def _head_dim(hf: ConfigFile, num_heads: int) -> int:
    if hf.value("qk_rope_head_dim") is not None:  # MLA: older files have no head_dim
        return hf.whole("qk_rope_head_dim")
    if hf.value("head_dim") is None:
        hidden_size = hf.whole("hidden_size")
        if hidden_size % num_heads:
            hf.refuse("num_attention_heads", f"must divide hidden_size, {hidden_size}, where head_dim is absent")
        head_dim = hidden_size // num_heads
    else:
        head_dim = hf.whole("head_dim")
    return head_dim
