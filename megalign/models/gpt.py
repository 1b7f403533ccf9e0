"""Builds Megatron's GPTModel from a ModelConfig: one rank's model chunks, of which the last returns hidden states.

The head's product with the hidden states is left to `megalign.ops`, which needs only its weight.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
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
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megalign.model_config import ModelConfig
from megalign.models.attention import GroupedAttention, LatentAttention, ResidualMLP
from megalign.models.experts import BalancedRouter, OwnOutputLinear, complete_megatron
from megalign.models.layers import RMSNorm
from megalign.models.lora import Adapters
from megalign.models.rope import Rotary
from megalign.models.slots import Slots
from megalign.schema import UserError, reason_of


class PolicyModel(GPTModel):
    """Runs a GPTModel over packed rows; its last stage returns hidden states instead of logits.

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
        position_L: Tensor,
        length_L: Tensor,
        slots: Slots,
        padding_L: Tensor | None = None,
    ) -> Tensor:
        """Return a packed row's hidden states [L (L/tp under sequence parallelism), 1, H]; slots are independent.

        length_L: that of each position's sequence. padding_L: positions that routers leave out of their statistics; as
        long as this rank's hidden states.
        """
        embedded = None
        if self.pre_process:
            embedded = self.embedding(token_L[None], position_L[None])
            if self.embedding_scale != 1.0:
                embedded = embedded * torch.tensor(self.embedding_scale, dtype=embedded.dtype)
            if self.adapters is not None and torch.is_grad_enabled():
                embedded.requires_grad_()  # recomputed layers get gradients only if their input requires one
        packed: Any = slots
        if self.uses_te:
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=slots.borders,
                cu_seqlens_kv=slots.borders,
                max_seqlen_q=slots.longest,
                max_seqlen_kv=slots.longest,
            )
            rotary = self.rotary.angles(slots.longest, position_L.device)
        else:
            rotary = self.rotary(position_L, length_L, self.rope_dtype)
        return self.decoder(  # type: ignore[no-any-return]
            hidden_states=embedded,
            attention_mask=None,
            rotary_pos_emb=rotary,
            packed_seq_params=packed,
            padding_mask=None if padding_L is None else padding_L[None],
        )

    @property
    def layer_numbers(self) -> list[int]:
        """Return the numbers, from 0, of this chunk's layers in the whole model."""
        return [layer.layer_number - 1 for layer in self.decoder.layers]

    @property
    def routers(self) -> list[BalancedRouter]:
        """Return the routers of this chunk's layers with experts."""
        return [layer.mlp.router for layer in self.decoder.layers if isinstance(layer.mlp, MoELayer)]

    @property
    def head_weight(self) -> Tensor:
        """Return this rank's rows of the vocabulary head (last stage only); the embedding's where they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def choose_layers(wanted: str, model: ModelConfig, *, on_cuda: bool, dtype: torch.dtype, context_size: int) -> str:
    """Resolve `engine.layers`: auto means TransformerEngine on CUDA where it imports and can compute the model.

    Otherwise auto means torch.
    """
    if wanted != "auto":
        return wanted
    fits = on_cuda and _te_problem(model, dtype, context_size) is None
    return "transformer_engine" if fits and te_import_problem() is None else "torch"


def te_import_problem() -> str | None:
    """Return why TransformerEngine cannot be imported; None if it can."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # built for another torch or CUDA
        return reason_of(error)
    return None


def _te_problem(model: ModelConfig, dtype: torch.dtype, context_size: int) -> str | None:
    """Return why TransformerEngine's layers cannot compute a model and what engine.layers must be; None if they can."""
    if dtype != torch.bfloat16:
        return "it has no packed attention for fp32, whose products it computes in TF32; must be auto or torch"
    if context_size > 1 and model.sliding_window:
        return "it has no sliding window under this context parallelism; must be auto or torch"
    if model.mlp_bias != model.out_bias:
        return "a model with a bias in only one of attention output and MLP must have engine.layers torch"
    if not model.is_plain:
        return f"it lacks what the layers of {model.family} compute; must be auto or torch"
    return None


def build_chunks(
    model: ModelConfig, config: TransformerConfig, *, layers: str, first: bool, last: bool
) -> list[PolicyModel]:
    """Build a rank's model chunks (one without a virtual pipeline) over the current parallel groups, without weights.

    first, last: whether the rank is the pipeline's first, which has the embedding, or its last, which has the head.
    """
    problem = None
    if layers == "transformer_engine":
        problem = _te_problem(model, config.params_dtype, config.context_parallel_size)
    if problem is not None:
        raise UserError(f"engine.layers is transformer_engine: {problem}")
    complete_megatron()
    if layers == "transformer_engine" and rope_utils.fused_apply_rotary_pos_emb_thd is not None:
        config.apply_rope_fusion = True  # Megatron's own form reads each slot's length back in each layer
    count = config.virtual_pipeline_model_parallel_size or 1
    chunks = []
    for stage in range(count):
        chunk = PolicyModel(
            model,
            layers=layers,
            config=config,
            transformer_layer_spec=_block_spec(model, config, layers, stage if count > 1 else None),
            vocab_size=model.padded_vocab_size,
            max_sequence_length=model.max_positions,
            pre_process=first and stage == 0,
            post_process=last and stage == count - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=model.tied,
            position_embedding_type="rope",
            rotary_base=int(model.rope.theta),
            vp_stage=stage if count > 1 else None,
        )
        _mark_shards(chunk)
        chunks.append(chunk)
    return chunks


def _mark_shards(chunk: PolicyModel) -> None:
    """Mark the parameters that are sharded over tensor ranks; Megatron does so only when it initialises weights.

    Gradient norms, exports and checkpoints rely on these marks.
    """
    for module in chunk.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)) and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, True, 0, 1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(module.weight, True, 1, 1)
        elif isinstance(module, SequentialMLP):
            # An expert is never sharded; its replicas are the expert-data group, also without expert parallelism.
            for parameter in module.parameters():
                parameter.allreduce = False
                parameter.sequence_parallel = False  # tensor ranks hold different experts
    for parameter in chunk.parameters():
        if not getattr(parameter, "allreduce", True):
            # Gradient norms count parameters without the mark only on the first tensor rank; here every rank has
            # experts of its own, or its own part of an expert's optimizer.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)


def _block_spec(
    model: ModelConfig, config: TransformerConfig, layers: str, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Return the specs of a chunk's layers, dense or with experts."""
    first = get_transformer_layer_offset(config, vp_stage)
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage))
    make = _te_layer if layers == "transformer_engine" else _torch_layer
    kinds = {experts: make(model, experts=experts) for experts in {model.has_experts(number) for number in numbers}}
    specs = [kinds[model.has_experts(number)] for number in numbers]
    if layers != "transformer_engine":
        return TransformerBlockSubmodules(layer_specs=specs, layer_norm=_norm(model))
    from megatron.core.extensions.transformer_engine import TENorm  # needs TransformerEngine

    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=TENorm)


def _te_layer(model: ModelConfig, *, experts: bool) -> ModuleSpec:
    """Return TransformerEngine's layer with the router of `models.experts`."""
    count = model.moe.num_experts if experts and model.moe is not None else None
    layer: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=count, moe_grouped_gemm=False, qk_layernorm=model.qk_norm == "head"
    )
    if experts and model.moe is not None:
        layer.submodules.mlp.submodules.router = partial(BalancedRouter, moe=model.moe)
    return layer


def _torch_layer(model: ModelConfig, *, experts: bool) -> ModuleSpec:
    """Return Megatron's local layer with the attention, norms and router of `models`."""
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
