"""Megatron's GPTModel from a ModelConfig: one pipeline stage of one tensor-parallel rank, ending in hidden states.

The head's product with the hidden states is left to `megalign.ops`, which needs only its weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_defaults_if_not_set_tensor_model_parallel_attributes,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megalign.convert.model_config import ModelConfig
from megalign.models.layers import PackedAttention, RMSNorm
from megalign.schema import UserError


class PolicyModel(GPTModel):
    """A GPTModel over packed rows whose last stage returns hidden states instead of logits."""

    def __init__(self, model: ModelConfig, *, layers: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.uses_te = layers == "transformer_engine"
        # A plain attribute: a buffer would be cast to bf16 with the parameters and would enter checkpoints.
        self.inverse_frequency = rope_frequencies(model)

    def forward(self, token_T: Tensor, position_T: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:  # type: ignore[override]
        """Hidden states [T or T/tp under sequence parallelism, 1, H] of a packed row; slots never see each other."""
        embedded = self.embedding(token_T[None], position_T[None]) if self.pre_process else None
        frequency_TD = position_T.float()[:, None] * self.inverse_frequency.to(position_T.device)
        angle_T11D = torch.cat((frequency_TD, frequency_TD), dim=-1)[:, None, None, :]
        packed = None
        if self.uses_te:
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_kv=cu_seqlens,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
        return self.decoder(  # type: ignore[no-any-return]
            hidden_states=embedded,
            attention_mask=None if self.uses_te else cu_seqlens,
            rotary_pos_emb=angle_T11D,
            packed_seq_params=packed,
        )

    @property
    def head_weight(self) -> Tensor:
        """The rows of the vocabulary head on this rank (last stage only); the embedding's where they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def rope_frequencies(model: ModelConfig) -> Tensor:
    """Inverse frequencies [head_dim / 2] fp32, with Llama 3's scaling where the model has it (Llama 3.1 report)."""
    exponent = torch.arange(0, model.head_dim, 2, dtype=torch.int64).float() / model.head_dim
    frequency = 1.0 / (model.rope_theta**exponent)
    scaling = model.rope_scaling
    if scaling is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    low = scaling.original_max_positions / scaling.low_freq_factor
    high = scaling.original_max_positions / scaling.high_freq_factor
    smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    scaled = torch.where(wavelength > low, frequency / scaling.factor, frequency)
    return torch.where((wavelength <= low) & (wavelength >= high), blended, scaled)


def choose_layers(wanted: str, *, on_cuda: bool) -> str:
    """What `engine.layers` means here: TransformerEngine's layers on CUDA where they import, torch's elsewhere."""
    if wanted != "auto":
        return wanted
    if not on_cuda:
        return "torch"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return "torch"
    return "transformer_engine"


def transformer_config(
    model: ModelConfig,
    *,
    tensor: int,
    pipeline: int,
    sequence_parallel: bool,
    dtype: torch.dtype,
    on_cuda: bool,
    recompute: str,
    extra: Mapping[str, Any],
) -> TransformerConfig:
    """Megatron's configuration of a model and layout; `extra` is what the user passes through."""
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
        "activation_func": F.silu,
        "add_bias_linear": model.out_bias or model.mlp_bias,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "window_size": (model.sliding_window - 1, 0) if model.sliding_window else None,
        # The two passes of a step must compute the same function.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "sequence_parallel": sequence_parallel,
        "variable_seq_lengths": pipeline > 1,
        "moe_token_dispatcher_type": "alltoall",  # dense models too: the default refuses variable lengths
        "pipeline_dtype": dtype,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        # Losses arrive as sums with the global divisor inside: Megatron must divide by nothing.
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "use_cpu_initialization": not on_cuda,
        "perform_initialization": False,
    }
    if recompute == "full":
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif recompute == "selective":
        fields |= {"recompute_granularity": "selective"}
    return TransformerConfig(**(fields | dict(extra)))


def build_stage(model: ModelConfig, config: TransformerConfig, *, layers: str, first: bool, last: bool) -> PolicyModel:
    """One pipeline stage on the current parallel groups; its weights are uninitialised until a checkpoint is loaded."""
    if layers == "transformer_engine":
        if model.mlp_bias != model.out_bias:
            raise UserError(
                "engine.layers is transformer_engine: a model with a bias in only one of attention output and MLP "
                "needs engine.layers torch"
            )
        spec: Any = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_norm)
    else:
        spec = _torch_spec(model, config)
    stage = PolicyModel(
        model,
        layers=layers,
        config=config,
        transformer_layer_spec=spec,
        vocab_size=model.padded_vocab_size,
        max_sequence_length=model.max_positions,
        pre_process=first,
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=model.tied,
        position_embedding_type="rope",
        rotary_base=int(model.rope_theta),
    )
    _mark_shards(stage)
    _drop_biases(stage, model)
    return stage


def _mark_shards(stage: PolicyModel) -> None:
    """Say which parameters are cut over tensor ranks; Megatron says it only when it initialises weights.

    Gradient norms, exports and checkpoints all go by these marks.
    """
    for module in stage.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)) and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, True, 0, 1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(module.weight, True, 1, 1)
    for parameter in stage.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)


def _drop_biases(stage: PolicyModel, model: ModelConfig) -> None:
    """Megatron has one switch for the biases of attention output and MLP; a model may have only one of the two."""
    if model.mlp_bias == model.out_bias:
        return
    for layer in stage.decoder.layers:
        mlp = [layer.mlp.linear_fc1, layer.mlp.linear_fc2]
        for linear in [layer.self_attention.linear_proj] if model.mlp_bias else mlp:
            linear.register_parameter("bias", None)


def _torch_spec(model: ModelConfig, config: TransformerConfig) -> TransformerBlockSubmodules:
    """Megatron's local layers with our attention and norms."""
    layer: ModuleSpec = get_gpt_layer_local_spec(qk_layernorm=model.qk_norm, normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if model.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)
