"""Small random models of transformers' own classes, and what they compute one sequence at a time."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4}
BOTH_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 4,  # of the rotary part
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "qwen3": SHAPE,
    "mistral": SHAPE,
    "phimoe": {**SHAPE, **EXPERTS},  # has a window, but does not tell its attention function
    "gemma2": {**SHAPE, **BOTH_LAYERS, "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
    "gemma3_text": {**SHAPE, **BOTH_LAYERS, "query_pre_attn_scalar": 8},
    "gpt_oss": {**SHAPE, **EXPERTS, **BOTH_LAYERS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "deepseek_v3": {**SHAPE, **LATENT},
    "olmoe": {**SHAPE, **EXPERTS},
    "phi": SHAPE,
    "cohere2": {**SHAPE, **BOTH_LAYERS},
    "gpt_neox": SHAPE,
    "gpt2": GPT2,
    "granite": SHAPE,
    "stablelm": SHAPE,  # does not hand its keyword arguments down to its attention
    "bert": SHAPE,  # attends both ways
}


def tiny_model(model_type: str, attention: str, *, layers_again: bool = False, **changes: Any) -> nn.Module:
    """Return a float64 model with random weights, large enough that attention is far from uniform.

    layers_again: transformers computes each layer again in backward; the model is in training mode then.
    """
    config = transformers.AutoConfig.for_model(model_type, **copy.deepcopy({**ARCHITECTURES[model_type], **changes}))
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, attn_implementation=attention, experts_implementation="eager"
    ).eval()
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(around, 0.3, generator=random)
    if layers_again:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def random_row(lengths: list[int], width: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return token ids [T], positions [T], borders of the slots and a gradient of the hidden states [T, width]."""
    random = torch.Generator().manual_seed(sum(lengths))
    return (
        torch.randint(3, 64, (sum(lengths),), generator=random),
        torch.cat([torch.arange(length) for length in lengths]),
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        torch.randn(sum(lengths), width, generator=random, dtype=torch.float64),
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients by name, zero where there is none, and forget them."""
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return found


def one_by_one(model: nn.Module, lengths: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return hidden states [T, H] and gradients, a sequence at a time."""
    ids, _, _, upstream = random_row(lengths)
    hidden = []
    for one, up in zip(ids.split(lengths), upstream.split(lengths), strict=True):
        hidden.append(model.base_model(input_ids=one[None], use_cache=False).last_hidden_state[0])
        hidden[-1].backward(up)
    return torch.cat(hidden).detach(), gradients(model)


def packed(model: nn.Module, lengths: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return hidden states [T, H] and gradients of one packed row."""
    ids, positions, borders, upstream = random_row(lengths)
    out = model.base_model(
        input_ids=ids[None], position_ids=positions[None], use_cache=False, cu_seq_lens_q=borders
    ).last_hidden_state[0]
    out.backward(upstream)
    return out.detach(), gradients(model)


def assert_close(mine: Tensor, right: Tensor, limit: float, name: str = "") -> None:
    """Compare by the largest number of `right`: transformers computes norms and shares in fp32 whatever the model's."""
    error, scale = float((mine - right).abs().max()), float(right.abs().max())
    assert error <= limit * max(scale, 1.0), f"{name}: {error:.2e} of {scale:.2e}"
