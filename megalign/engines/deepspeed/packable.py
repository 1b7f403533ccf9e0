"""Tells from class and configuration which models of transformers can be run on rows of several sequences, and how."""

from __future__ import annotations

import inspect
from typing import Any

PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
ROPE_BY_LENGTH = ("dynamic", "longrope")  # frequencies depend on the longest sequence of a row


def packing_problem(model_class: Any, config: Any) -> str | None:
    """Return why `PackedRows` cannot be a model's attention; None if it can.

    model_class: a class of `AutoModelForCausalLM`; config: its configuration. It reads what class and configuration
    declare; that the class hands `cu_seq_lens_q` down to its attention only a forward shows.
    """
    text = config.get_text_config(decoder=True)
    if not model_class._can_set_attn_implementation():
        return "its attention does not go through transformers' attention interface"
    if not model_class._supports_flash_attn:
        return "its attention is of a kind that flash attention does not have"
    if "position_ids" not in inspect.signature(model_class.forward).parameters:
        return "it takes no position_ids"
    if config.is_encoder_decoder:
        return "it is an encoder with a decoder"
    kinds = sorted(set(getattr(text, "layer_types", None) or ()) - PACKABLE_LAYERS)
    if kinds:
        return f"it has layers of type {', '.join(kinds)}"
    if model_class._is_stateful:
        return "it has recurrent layers"
    if getattr(text, "attention_chunk_size", None):
        return "its attention is chunked"
    # "vision" is about the places of an image, of which a row of text has none.
    both_ways = getattr(text, "use_bidirectional_attention", None) or "vision"
    if not getattr(text, "is_causal", True) or both_ways != "vision":
        return "its attention is not causal"
    return None


def length_limit(config: Any) -> int | None:
    """Return the longest sequence that has the same rotary frequencies in any row; None where all have.

    Beyond it they depend on the longest sequence of the row, packed or padded, in transformers' own models.
    """
    text = config.get_text_config(decoder=True)
    given = getattr(text, "rope_parameters", None) or {}
    limits = [
        int(parameters.get("original_max_position_embeddings") or text.max_position_embeddings)
        for parameters in (given, *given.values())  # one for all layers, or one for each type of layer
        if isinstance(parameters, dict) and parameters.get("rope_type") in ROPE_BY_LENGTH
    ]
    return min(limits, default=None)
