"""Megatron's GPTModel from a ModelConfig: the model chunks of one rank, of which the last one ends in hidden states.

The head's product with the hidden states is left to `megalign.ops`, which needs only its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu
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
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from torch.nn import functional as F

from megalign.convert.model_config import ModelConfig
from megalign.models.attention import GroupedAttention, LatentAttention, ResidualMLP
from megalign.models.experts import BalancedRouter, OwnOutputLinear
from megalign.models.layers import RMSNorm
from megalign.models.lora import Adapters
from megalign.models.rope import Rotary
from megalign.schema import UserError

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "clamped_swiglu": quick_gelu}
SWIGLU_LIMIT = 7.0


class PolicyModel(GPTModel):
    """A GPTModel over packed rows whose last stage returns hidden states instead of logits.

    Axes: L token positions of a row that this context rank holds, T those of the whole row.
    """

    def __init__(self, model: ModelConfig, *, layers: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.uses_te = layers == "transformer_engine"
        self.rotary, self.embedding_scale = Rotary(model.ropes), model.embedding_scale
        self.rope_dtype = torch.float32 if model.rope_fp32 else self.config.params_dtype
        self.adapters: Adapters | None = None

    def forward(  # type: ignore[override]
        self,
        token_L: Tensor,
        position: Tensor,
        length: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        padding_L: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [L or L/tp under sequence parallelism, 1, H] of a packed row; slots never see each other.

        position, and length (tokens of the sequence it is of): [L], or [T] for TransformerEngine's layers, which take
        their part themselves. cu_seqlens and longest are those of the whole row. padding_L: what the routers leave out
        of their statistics, of as many positions as this rank has hidden states.
        """
        embedded = None
        if self.pre_process:
            embedded = self.embedding(token_L[None], position[None])
            if self.embedding_scale != 1.0:
                embedded = embedded * torch.tensor(self.embedding_scale, dtype=embedded.dtype)
            if self.adapters is not None and torch.is_grad_enabled():
                embedded.requires_grad_()  # recomputed layers have a gradient only where their input has one
        packed = None
        if self.uses_te:
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_kv=cu_seqlens,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
            rotary = self.rotary.angles(position)
        else:
            rotary = self.rotary(position, length, self.rope_dtype)
        return self.decoder(  # type: ignore[no-any-return]
            hidden_states=embedded,
            attention_mask=None if self.uses_te else cu_seqlens,
            rotary_pos_emb=rotary,
            packed_seq_params=packed,
            padding_mask=None if padding_L is None else padding_L[None],
        )

    @property
    def layer_numbers(self) -> list[int]:
        """Which layers of the whole model, from 0, this chunk holds."""
        return [layer.layer_number - 1 for layer in self.decoder.layers]

    @property
    def routers(self) -> list[BalancedRouter]:
        return [layer.mlp.router for layer in self.decoder.layers if isinstance(layer.mlp, MoELayer)]

    @property
    def head_weight(self) -> Tensor:
        """The rows of the vocabulary head on this rank (last stage only); the embedding's where they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def choose_layers(wanted: str, model: ModelConfig, *, on_cuda: bool) -> str:
    """What `engine.layers` means here: TransformerEngine's layers on CUDA where they import and can compute the model,
    torch's elsewhere."""
    if wanted != "auto":
        return wanted
    if not on_cuda or not model.is_plain or model.mlp_bias != model.out_bias:
        return "torch"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return "torch"
    return "transformer_engine"


def split_layers(num_layers: int, stages: int) -> list[int]:
    """Layers of each stage in order, as even as can be; the last, which has the head, and the first have fewer."""
    even, left = divmod(num_layers, stages)
    takers = [*range(1, stages - 1), 0][:left]
    return [even + (stage in takers) for stage in range(stages)]


def split_problem(text: str, num_layers: int, pipeline: int, virtual: int) -> str | None:
    """Why Megatron could not build a user's own split of layers over stages (`Ett|tt|ttL`); None where it could."""
    try:
        split = PipelineParallelLayerLayout.from_str(text, pipeline)
        split.validate_layer_layout(num_layers, 0)
    except (AssertionError, ValueError, TypeError, KeyError) as error:
        return " ".join(str(error).split())
    found = split.virtual_pipeline_model_parallel_size
    return None if found == virtual else f"it has {pipeline * found} stages"


def transformer_config(
    model: ModelConfig,
    *,
    tensor: int,
    pipeline: int,
    virtual: int,
    context: int,
    expert: int,
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
        "activation_func": ACTIVATIONS[model.activation],
        # Attention of our own has its own biases; TransformerEngine's has those of the MLP.
        "add_bias_linear": model.mlp_bias or (model.moe is not None and model.moe.bias),
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm == "head",
        "window_size": (model.sliding_window - 1, 0) if model.sliding_window else None,
        # The two passes of a step must compute the same function.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "context_parallel_size": context,
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
    if model.activation == "clamped_swiglu":
        fields |= {"glu_linear_offset": 1.0, "activation_func_clamp_value": SWIGLU_LIMIT}
    fields |= _pipeline_fields(model, pipeline, virtual) | _expert_fields(model, expert)
    if recompute == "full":
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif recompute == "selective":
        fields |= {"recompute_granularity": "selective"}
    return TransformerConfig(**(fields | dict(extra)))


def _pipeline_fields(model: ModelConfig, pipeline: int, virtual: int) -> dict[str, Any]:
    if pipeline == 1:
        return {}
    chunks = [["decoder"] * count for count in split_layers(model.num_layers, pipeline * virtual)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    fields: dict[str, Any] = {"pipeline_model_parallel_layout": chunks}
    if virtual > 1:
        # Batched messages of two ranks that are each other's next and previous are paired wrongly, without an error.
        fields |= {"virtual_pipeline_model_parallel_size": virtual, "overlap_p2p_comm": True, "batch_p2p_comm": False}
    return fields


def _expert_fields(model: ModelConfig, expert: int) -> dict[str, Any]:
    moe = model.moe
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.ffn_size,
        "moe_router_topk": moe.top_k,
        # Softmax over the chosen experts alone is softmax over all with the chosen ones' shares summing to one.
        "moe_router_pre_softmax": not moe.normalize,
        "moe_router_topk_scaling_factor": None if moe.scale == 1.0 else moe.scale,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",  # `models.experts` has a loss of its own
        "moe_layer_freq": [int(model.has_experts(layer)) for layer in range(model.num_layers)],
        "moe_shared_expert_intermediate_size": moe.shared_ffn_size or None,
        "moe_shared_expert_gate": moe.shared_gate,
        "expert_model_parallel_size": expert,
        "expert_tensor_parallel_size": 1,
    }


def build_chunks(
    model: ModelConfig, config: TransformerConfig, *, layers: str, first: bool, last: bool
) -> list[PolicyModel]:
    """A rank's model chunks on the current parallel groups, one without a virtual pipeline; weights are uninitialised.

    first, last: whether the rank is the pipeline's first, which has the embedding, or its last, which has the head.
    """
    if layers == "transformer_engine" and model.mlp_bias != model.out_bias:
        raise UserError(
            "engine.layers is transformer_engine: a model with a bias in only one of attention output and MLP "
            "needs engine.layers torch"
        )
    if layers == "transformer_engine" and not model.is_plain:
        raise UserError(
            f"engine.layers is transformer_engine: it lacks what the layers of {model.family} compute; "
            "allowed: auto, torch"
        )
    count = config.virtual_pipeline_model_parallel_size or 1
    chunks = []
    for place in range(count):
        chunk = PolicyModel(
            model,
            layers=layers,
            config=config,
            transformer_layer_spec=_block_spec(model, config, layers, place if count > 1 else None),
            vocab_size=model.padded_vocab_size,
            max_sequence_length=model.max_positions,
            pre_process=first and place == 0,
            post_process=last and place == count - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=model.tied,
            position_embedding_type="rope",
            rotary_base=int(model.rope.theta),
            vp_stage=place if count > 1 else None,
        )
        _mark_shards(chunk)
        chunks.append(chunk)
    return chunks


def _mark_shards(chunk: PolicyModel) -> None:
    """Say which parameters are cut over tensor ranks; Megatron says it only when it initialises weights.

    Gradient norms, exports and checkpoints all go by these marks.
    """
    for module in chunk.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)) and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, True, 0, 1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(module.weight, True, 1, 1)
        elif isinstance(module, SequentialMLP):
            # Whole on their ranks; copies are found by the expert-data group, also where experts are not cut at all.
            for parameter in module.parameters():
                parameter.allreduce = False
                parameter.sequence_parallel = False  # tensor ranks hold different experts
    for parameter in chunk.parameters():
        if not getattr(parameter, "allreduce", True):
            # Norms leave out what is not cut on all tensor ranks but the first; these have experts of their own, or
            # their own part of an expert's optimizer.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)


def _block_spec(
    model: ModelConfig, config: TransformerConfig, layers: str, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """A chunk's layers, dense or with experts."""
    first = get_transformer_layer_offset(config, vp_stage)
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage))
    make = _te_layer if layers == "transformer_engine" else _torch_layer
    kinds = {experts: make(model, experts=experts) for experts in {model.has_experts(number) for number in numbers}}
    specs = [kinds[model.has_experts(number)] for number in numbers]
    if layers != "transformer_engine":
        return TransformerBlockSubmodules(layer_specs=specs, layer_norm=_norm(model))
    from megatron.core.extensions.transformer_engine import TENorm  # only there where TransformerEngine is

    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=TENorm)


def _te_layer(model: ModelConfig, *, experts: bool) -> ModuleSpec:
    """TransformerEngine's layer with our router."""
    count = model.moe.num_experts if experts and model.moe is not None else None
    layer: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=count, moe_grouped_gemm=False, qk_layernorm=model.qk_norm == "head"
    )
    if experts and model.moe is not None:
        layer.submodules.mlp.submodules.router = partial(BalancedRouter, moe=model.moe)
    return layer


def _torch_layer(model: ModelConfig, *, experts: bool) -> ModuleSpec:
    """Megatron's local layer with our attention, norms and router."""
    count = model.moe.num_experts if experts and model.moe is not None else None
    layer: ModuleSpec = get_gpt_layer_local_spec(num_experts=count, moe_grouped_gemm=False, normalization="RMSNorm")
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = _norm(model) if model.pre_norm else IdentityOp
    attention = GroupedAttention if model.latent is None else LatentAttention
    parts.self_attention = ModuleSpec(module=attention, params={"model": model})
    if experts and model.moe is not None:
        parts.mlp.submodules.router = partial(BalancedRouter, moe=model.moe)
        if model.moe.bias:
            parts.mlp.submodules.experts.submodules.linear_fc2 = OwnOutputLinear
    elif model.post_norm or model.residual_scale != 1.0:
        parts.mlp = ModuleSpec(module=ResidualMLP, params={"model": model}, submodules=parts.mlp.submodules)
    return layer


def _norm(model: ModelConfig) -> ModuleSpec:
    return ModuleSpec(module=RMSNorm, params={"offset": model.norm_offset, "in_fp32": model.norm_fp32})
