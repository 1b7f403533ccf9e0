"""Tiny random checkpoints of every family, each with all that makes it different; written by transformers itself."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import transformers

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}
LATENT = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
# name: (model_type, fields); 8 heads share 2 key-value heads, 131 rows of the vocabulary divide by nothing
FAMILY_CASES: dict[str, tuple[str, dict[str, object]]] = {
    "gemma2": (
        "gemma2",
        {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 6, "attn_logit_softcapping": 3.0},
    ),
    "gemma2-untied": ("gemma2", {"head_dim": 6, "tie_word_embeddings": False, "attention_bias": True}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gemma3-untied": (
        "gemma3_text",
        {"head_dim": 8, "sliding_window": 5, "tie_word_embeddings": False, "rope_parameters": None},
    ),
    "phi3": ("phi3", {"sliding_window": 7}),
    "phi3-long": (
        "phi3",
        {
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1000.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.5],
                "long_factor": [2.0, 3.0],
            },
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo2-tied": ("olmo2", {"tie_word_embeddings": True, "attention_bias": True}),
    "olmo3": (
        "olmo3",
        {
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
        },
    ),
    "olmo3-tied": ("olmo3", {"sliding_window": 5, "tie_word_embeddings": True, "rope_parameters": None}),
    "glm": ("glm", {"head_dim": 8}),
    "glm-tied": ("glm", {"head_dim": 12, "tie_word_embeddings": True, "attention_bias": False}),
    "glm4": ("glm4", {"head_dim": 8}),
    "glm4-tied": ("glm4", {"head_dim": 12, "tie_word_embeddings": True, "attention_bias": False}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.3,
            "attention_bias": True,
        },
    ),
    "granite-tied": ("granite", {"tie_word_embeddings": True, "residual_multiplier": 0.5, "mlp_bias": True}),
    "smollm3": ("smollm3", {}),
    "smollm3-untied": (
        "smollm3",
        {
            "tie_word_embeddings": False,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 5,
            "attention_bias": True,
        },
    ),
    "ministral": (
        "ministral",
        {"sliding_window": 5, "layer_types": ["full_attention", *["sliding_attention"] * 3], "head_dim": 8},
    ),
    "qwen2-mixed": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "deepseek-v2": ("deepseek_v2", {**LATENT, "topk_method": "group_limited_greedy"}),
    "deepseek-v2-lite": (
        "deepseek_v2",
        {
            **LATENT,
            "q_lora_rank": None,
            "tie_word_embeddings": True,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5},
        },
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {**LATENT, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek-v3-bias": (
        "deepseek_v3",
        {
            **LATENT,
            "attention_bias": True,
            "norm_topk_prob": False,
            "rope_interleave": False,
            "tie_word_embeddings": True,
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            "head_dim": 8,
            "sliding_window": 5,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 16,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "gpt-oss-tied": (
        "gpt_oss",
        {
            "head_dim": 6,
            "sliding_window": 3,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "intermediate_size": 24,
            "attention_bias": False,
            "tie_word_embeddings": True,
        },
    ),
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
# The families whose layers Megatron-Core has by itself, of which tests/convert and tests/engines have more.
PLAIN_CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": (
        "llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama-tied": (
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
        },
    ),
    "mistral": ("mistral", {"sliding_window": 5, "head_dim": 6}),
    "mistral-tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 10}),
    "qwen3-tied": ("qwen3", {"head_dim": 6, "tie_word_embeddings": True, "attention_bias": True}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}),
    "mixtral-tied": ("mixtral", {"num_local_experts": 6, "num_experts_per_tok": 3, "tie_word_embeddings": True}),
    "qwen2-moe": (
        "qwen2_moe",
        {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16, "mlp_only_layers": [1]},
    ),
    "qwen2-moe-tied": (
        "qwen2_moe",
        {
            **EXPERTS,
            "num_experts": 6,
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-moe": ("qwen3_moe", {**EXPERTS, "num_experts": 4, "norm_topk_prob": True, "head_dim": 8}),
    "qwen3-moe-tied": (
        "qwen3_moe",
        {**EXPERTS, "num_experts": 8, "decoder_sparse_step": 2, "head_dim": 6, "tie_word_embeddings": True},
    ),
}
SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERT_FAMILIES = ("deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe")


def write_family(folder: Path, case: str, *, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Save a case with every parameter and buffer that is stored random: norms are not one, biases not zero."""
    model_type, fields = {**FAMILY_CASES, **PLAIN_CASES}[case]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(model_type, **copy.deepcopy({**SIZES, **fields, **changes}))
    )
    random = torch.Generator().manual_seed(len(case))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=random) * (0.3 if tensor.dim() == 1 else 0.25))
            if tensor.dim() == 1 and name.endswith("norm.weight"):
                tensor.add_(0.0 if model_type.startswith("gemma") else 1.0)
        for name, tensor in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=random) * 0.1)
    model.to(dtype)
    for name, tensor in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # published checkpoints keep it so
            tensor.data = tensor.data.float()
    model.save_pretrained(folder)
    return folder
