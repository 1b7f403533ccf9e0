"""Reads the config.json of a Hugging Face checkpoint once, of a family in our tables or any other model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalign.convert.hf.config import model_config_of
from megalign.convert.hf.config_json import ConfigFile, read_json
from megalign.model_config import ModelConfig, ModelFacts, attention_cost
from megalign.schema import UserError

# Names of a field in transformers' configurations; the first that is present counts.
VOCAB, LAYERS = ("vocab_size",), ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
LISTED = ("layers_block_type", "layer_types", "hybrid_override_pattern")  # with an item for each layer
HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model")
HEADS = ("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
FFN = ("moe_intermediate_size", "intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
ROUTED = ("num_experts_per_tok", "moe_top_k", "moe_topk")
SECTIONED = ("kv_n_heads", "ffn_hidden_size", "moe_top_k", "ffn_act_fn")  # in attn_config and ffn_config
GATED = ("silu", "swish")  # activations of MLPs that are gated: they have a third matrix
HEADLESS = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")  # model types without attention


@dataclass(frozen=True, slots=True)
class HFModel:
    """Holds a checkpoint directory, its parsed config.json, and the model it describes."""

    folder: Path
    hf: Mapping[str, Any]
    facts: ModelFacts
    config: ModelConfig | None  # None: the family is not in our tables, or unsupported
    problem: str = ""  # the error of reading it as one of our families

    def known(self) -> ModelConfig:
        """Return the ModelConfig; UserError where our tables do not describe the model."""
        if self.config is None:
            raise UserError(self.problem)
        return self.config


def read_model(folder: Path) -> HFModel:
    """Read a checkpoint's config.json; UserError where neither our tables nor the common fields describe the model."""
    path = folder / "config.json"
    hf = read_json(path)
    try:
        config = model_config_of(path, hf)
    except UserError as error:
        try:
            return HFModel(folder, hf, facts_of(path, hf), None, str(error))
        except UserError:
            raise error from None
    return HFModel(folder, hf, config.facts, config)


def facts_of(path: Path, hf: Mapping[str, Any]) -> ModelFacts:
    """Return the sizes in any `AutoModelForCausalLM` configuration; UserError where a required field is missing.

    A model without attention counts as one head, and its pairs of positions cost nothing.
    """
    text = ConfigFile(path, _text_fields(hf), {})

    def first(names: tuple[str, ...], default: int | None = None) -> int:
        name = next((name for name in names if text.value(name) is not None), None)
        return default if name is None and default is not None else text.whole(name or names[0])

    listed = next((len(text.value(name)) for name in LISTED if text.value(name)), None)
    layers, hidden = first(LAYERS, listed), first(HIDDEN)
    limited = any(text.value(name) is not None for name in POSITIONS) and hf.get("alibi") is not True
    positions = first(POSITIONS) if limited else None
    if text.value("model_type") in HEADLESS:
        return ModelFacts(first(VOCAB), layers, hidden, 1, 1, positions, 0.0)
    heads = first(HEADS)
    single = text.value("multi_query") is True and text.value("new_decoder_architecture") is not True
    kv_heads = 1 if single else first(KV_HEADS, heads)
    head_dim = first(("head_dim",), max(1, hidden // heads))
    size = heads * 2 * head_dim
    cost = attention_cost(
        layers,
        size,
        attention_size=hidden * (size + kv_heads * 2 * head_dim),
        ffn_size=hidden * _ffn_width(text, first(FFN, 4 * hidden), first(ROUTED, 1)) * layers,
    )
    return ModelFacts(first(VOCAB), layers, hidden, heads, kv_heads, positions, cost)


def _text_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that describe the text's decoder, with those that DBRX keeps in sections of their own."""
    fields = hf["text_config"] if isinstance(hf.get("text_config"), dict) else hf
    sections = [fields[name] for name in ("attn_config", "ffn_config") if isinstance(fields.get(name), dict)]
    moved = {key: section[key] for section in sections for key in SECTIONED if key in section}
    return {**moved, **fields}


def _ffn_width(text: ConfigFile, width: int, routed: int) -> int:
    """Return the rows of all matrices of the MLPs that a token uses in a layer."""
    shared = text.whole("shared_expert_intermediate_size") if text.value("shared_expert_intermediate_size") else 0
    activation = text.value("ffn_act_fn") or text.value("hidden_act") or text.value("activation_function")
    name = activation.get("name") if isinstance(activation, dict) else activation
    return (3 if name in GATED else 2) * (width * routed + shared)
