"""Tiny random checkpoints, written by transformers itself."""

import copy
from pathlib import Path

import torch
import transformers

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# name: (model_type, dtype, tied, what differs from SIZES)
CASES = {
    "llama-bias": ("llama", "float32", False, {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", "bfloat16", True, {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", "bfloat16", False, {"sliding_window": 5, "head_dim": 6}),
    "mistral-tied": ("mistral", "float32", True, {"sliding_window": None}),
    "qwen2": ("qwen2", "bfloat16", False, {}),
    "qwen2-tied": ("qwen2", "float32", True, {}),
    "qwen3-bias": ("qwen3", "float32", False, {"head_dim": 10, "attention_bias": True}),
    "qwen3-tied": ("qwen3", "bfloat16", True, {"head_dim": 8}),
}
# The same, with experts, whose sizes are multiples of 16 bytes as the grouped product of transformers wants them.
EXPERT_CASES = {
    "mixtral": ("mixtral", "bfloat16", False, {"num_local_experts": 4, "intermediate_size": 8, "sliding_window": 5}),
    "mixtral-tied": (
        "mixtral",
        "float32",
        True,
        {"num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 8, "head_dim": 6},
    ),
    "qwen2-moe": (
        "qwen2_moe",
        "float32",
        False,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 16,
            "decoder_sparse_step": 2,
        },
    ),
    "qwen2-moe-tied": (
        "qwen2_moe",
        "bfloat16",
        True,
        {
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 16,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    "qwen3-moe": (
        "qwen3_moe",
        "bfloat16",
        False,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "head_dim": 8,
        },
    ),
    "qwen3-moe-bias": (
        "qwen3_moe",
        "float32",
        True,
        {
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 8,
            "attention_bias": True,
            "head_dim": 10,
        },
    ),
}
# Nothing divides by accident: 131 is prime, 6 query heads share 2 key-value heads.
SIZES = {
    "vocab_size": 131,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
COMPANIONS = {
    "tokenizer.json": b'{"version":\r\n "1.0"}',
    "tokenizer_config.json": b'{"model_max_length": 64}\n',
    "chat_template.jinja": b"{{ messages }}\r\n",
    "additional_chat_templates/tool.jinja": b"{{ tools }}",
}


def write_checkpoint(folder: Path, case: str, *, max_shard_size: str = "5GB", **changes: object) -> Path:
    """Save `case` with every parameter random: norms are not one, biases not zero."""
    model_type, dtype, tied, fields = {**CASES, **EXPERT_CASES}[case]
    config = transformers.AutoConfig.for_model(
        model_type, **copy.deepcopy({**SIZES, "tie_word_embeddings": tied, "pad_token_id": None, **fields, **changes})
    )
    torch.manual_seed(len(case))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    for name, content in COMPANIONS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
