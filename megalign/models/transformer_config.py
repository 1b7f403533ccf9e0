"""Builds Megatron's TransformerConfig from a ModelConfig, a layout and options of computation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megalign.config.layout import Layout, split_layers
from megalign.model_config import ModelConfig

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "clamped_swiglu": quick_gelu}
SWIGLU_LIMIT = 7.0
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def layers_of_split(text: str, pipeline: int) -> list[int]:
    """Return the number of layers in each of a user's own stages, in the model's order."""
    stages = PipelineParallelLayerLayout.from_str(text, pipeline).layout  # by pipeline rank, then by chunk
    return [chunk.count(LayerType.decoder) for chunks in zip(*stages, strict=True) for chunk in chunks]


def split_problem(text: str, num_layers: int, pipeline: int, virtual: int) -> str | None:
    """Return why Megatron cannot build a user's own split of layers over stages (`Ett|tt|ttL`); None where it can."""
    try:
        split = PipelineParallelLayerLayout.from_str(text, pipeline)
        split.validate_layer_layout(num_layers, 0)
    except (AssertionError, ValueError, TypeError, KeyError) as error:
        return " ".join(str(error).split())
    chunks = split.virtual_pipeline_model_parallel_size
    return None if chunks == virtual else f"it has {pipeline * chunks} stages"


@dataclass(frozen=True, slots=True)
class ComputeOptions:
    """Selects how a model's layers are computed."""

    dtype: torch.dtype
    device: torch.device
    recompute: str = "none"
    passed: Mapping[str, Any] = field(default_factory=dict)  # the user's own fields of Megatron's TransformerConfig


def transformer_config(model: ModelConfig, layout: Layout, options: ComputeOptions) -> TransformerConfig:
    """Return Megatron's configuration of a model in a layout."""
    dtype = options.dtype
    fields: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_size,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads,
        "kv_channels": model.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_eps,
        "gated_linear_unit": True,
        "activation_func": ACTIVATIONS[model.activation],
        # Our attention has bias settings of its own; TransformerEngine's follows this one, the MLP's.
        "add_bias_linear": model.mlp_bias or (model.moe is not None and model.moe.bias),
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm == "head",
        "window_size": (model.sliding_window - 1, 0) if model.sliding_window else None,
        # The two passes of a step must compute the same function.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "moe_token_dispatcher_type": "alltoall",  # dense models too: the default refuses variable lengths
        "pipeline_dtype": dtype,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        # Losses arrive as sums with the global divisor inside: Megatron must not divide.
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "use_cpu_initialization": options.device.type != "cuda",
        "perform_initialization": False,
    }
    if model.activation == "clamped_swiglu":
        fields |= {"glu_linear_offset": 1.0, "activation_func_clamp_value": SWIGLU_LIMIT}
    fields |= _layout_fields(layout) | _pipeline_fields(model, layout) | _expert_fields(model, layout)
    fields |= RECOMPUTE[options.recompute]
    return TransformerConfig(**(fields | dict(options.passed)))


def _layout_fields(layout: Layout) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "sequence_parallel": layout.sequence,
        "variable_seq_lengths": layout.pipeline > 1,
    }


def _pipeline_fields(model: ModelConfig, layout: Layout) -> dict[str, Any]:
    pipeline, virtual = layout.pipeline, layout.virtual_pipeline
    if pipeline == 1:
        return {}
    chunks = [["decoder"] * count for count in split_layers(model.num_layers, pipeline * virtual)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    fields: dict[str, Any] = {"pipeline_model_parallel_layout": chunks}
    if virtual > 1:
        # With two stages each is the other's next and previous: Megatron pairs batched messages wrongly, silently.
        fields |= {"virtual_pipeline_model_parallel_size": virtual, "overlap_p2p_comm": True, "batch_p2p_comm": False}
    return fields


def _expert_fields(model: ModelConfig, layout: Layout) -> dict[str, Any]:
    moe = model.moe
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.ffn_size,
        "moe_router_topk": moe.top_k,
        # Softmax over the chosen experts alone equals softmax over all, renormalised over the chosen.
        "moe_router_pre_softmax": not moe.normalize,
        "moe_router_topk_scaling_factor": None if moe.scale == 1.0 else moe.scale,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",  # `models.experts` has a loss of its own
        "moe_layer_freq": [int(model.has_experts(layer)) for layer in range(model.num_layers)],
        "moe_shared_expert_intermediate_size": moe.shared_ffn_size or None,
        "moe_shared_expert_gate": moe.shared_gate,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": 1,
    }
