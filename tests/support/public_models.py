"""The sizes of published models, as their config.json has them, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROPE = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "initializer_range": 0.02}
LLAMA = ROPE | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
QWEN3 = ROPE | {
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.001,
}


def sizes(hidden: int, layers: int, heads: int, ffn: int) -> dict[str, int]:
    """The four sizes that tell models of one kind apart, by their names in config.json."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(zip(names, (hidden, layers, heads, ffn), strict=True))


MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": LLAMA | sizes(2048, 16, 32, 8192) | {"tie_word_embeddings": True},
    "Llama-3.1-8B": LLAMA | sizes(4096, 32, 32, 14336),
    "Qwen3-32B": QWEN3
    | sizes(5120, 64, 64, 25600)
    | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_key_value_heads": 8},
    "Llama-3.1-70B": LLAMA | sizes(8192, 80, 64, 28672),
    "Qwen3-30B-A3B": QWEN3_MOE | sizes(2048, 48, 32, 6144) | {"moe_intermediate_size": 768},
    "Qwen3-235B-A22B": QWEN3_MOE | sizes(4096, 94, 64, 12288) | {"moe_intermediate_size": 1536},
}


def write_public(folder: Path, name: str) -> Path:
    """Write the config.json of a published model into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODELS[name]))
    return folder
