"""Tiny random checkpoints of families that our tables lack, and of odd ones; written by transformers itself."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import transformers

# Nothing divides by accident: 131 is prime, and no two sizes of a model are equal.
SIZES: dict[str, object] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
UNGROUPED: dict[str, object] = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
EXPERTS: dict[str, object] = {**SIZES, "intermediate_size": 32, "num_experts_per_tok": 2}
GPT: dict[str, object] = {"vocab_size": 131, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64, "n_inner": 40}
# name: (model_type, fields)
AUTO_CASES: dict[str, tuple[str, dict[str, object]]] = {
    # One dense and one with experts, as main examples: LayerNorm, partial rotary embeddings, biases; 5 experts.
    "stablelm": ("stablelm", {**SIZES, "use_qkv_bias": True, "partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "olmoe": ("olmoe", {**EXPERTS, "num_experts": 5, "norm_topk_prob": True}),
    "granitemoe": (
        "granitemoe",
        {
            **EXPERTS,
            "num_local_experts": 5,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.4,
            "tie_word_embeddings": True,
        },
    ),
    # Odd ones: transposed matrices and a tied head, a head with a bias, experts stacked by loading, an offset in
    # positions, one key-value head for all, parallel blocks, layers without a norm's bias, no attention at all.
    "gpt2": ("gpt2", {**GPT, "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}),
    "phi": ("phi", {**SIZES, "partial_rotary_factor": 0.5, "attention_dropout": 0.2}),
    "mixtral": ("mixtral", {**EXPERTS, "num_local_experts": 5, "router_jitter_noise": 0.3}),
    "phimoe": ("phimoe", {**EXPERTS, "num_local_experts": 5, "input_jitter_noise": 0.1, "lm_head_bias": True}),
    # A routing bias that stays in fp32, a shared expert, and a first layer without experts.
    "glm4_moe": (
        "glm4_moe",
        {
            **EXPERTS,
            "head_dim": 8,
            "moe_intermediate_size": 32,
            "n_routed_experts": 5,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_neox": ("gpt_neox", {**UNGROUPED, "rotary_pct": 0.5, "hidden_dropout": 0.1}),
    "opt": (
        "opt",
        {
            "vocab_size": 131,
            "hidden_size": 48,
            "word_embed_proj_dim": 24,
            "ffn_dim": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "max_position_embeddings": 64,
            "dropout": 0.1,
        },
    ),
    "falcon": ("falcon", {**UNGROUPED, "multi_query": True, "new_decoder_architecture": False}),
    "starcoder2": ("starcoder2", {**SIZES, "tie_word_embeddings": True}),
    "cohere2": ("cohere2", {**SIZES, "sliding_window": 5, "logit_scale": 0.5}),
    "bloom": ("bloom", {"vocab_size": 131, "hidden_size": 48, "n_layer": 3, "n_head": 6}),
    "mamba": ("mamba", {"vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 3, "state_size": 4}),
    # A decoder that is not the model's prefix, and logits that are capped by another name.
    "llama4_text": (
        "llama4_text",
        {
            **EXPERTS,
            "head_dim": 8,
            "intermediate_size_mlp": 40,
            "num_local_experts": 5,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 16,
        },
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {**SIZES, "lru_width": 48, "attention_window_size": 16, "logits_soft_cap": 5.0},
    ),
    "jetmoe": (
        "jetmoe",
        {
            "vocab_size": 131,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_key_value_heads": 3,
            "kv_channels": 8,
            "intermediate_size": 32,
            "max_position_embeddings": 64,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": True,
        },
    ),
    "dbrx": (
        "dbrx",
        {
            "vocab_size": 131,
            "d_model": 48,
            "n_layers": 2,
            "n_heads": 6,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1000.0},
            "ffn_config": {
                "hidden_size": 48,
                "ffn_hidden_size": 32,
                "moe_num_experts": 5,
                "moe_top_k": 2,
                "moe_jitter_eps": 0.1,
            },
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        },
    ),
}
TOKENS: dict[str, object] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def write_auto_checkpoint(folder: Path, name: str, *, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Save a case with every parameter random: norms are not one, biases not zero, logits far from uniform."""
    model_type, fields = AUTO_CASES[name]
    config = transformers.AutoConfig.for_model(model_type, **copy.deepcopy({**TOKENS, **fields, **changes}))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    random = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, tensor in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=random) * 0.1)
        for key, tensor in model.named_parameters():
            if key.endswith("A_log"):  # decay rates, which must not explode
                continue
            tensor.copy_(torch.randn(tensor.shape, generator=random) * (0.3 if tensor.dim() == 1 else 0.25))
            if tensor.dim() == 1 and "norm" in key.lower() and key.endswith("weight"):
                tensor.add_(1.0)
    model.to(dtype).save_pretrained(folder)
    return folder
