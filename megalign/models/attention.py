"""Implements a layer's self-attention, from hidden states to the output projection: grouped-query or latent.

Built on Megatron's parallel linear layers and their parameter names. Axes: L token positions of this context
rank, N heads of this tensor rank, K key/value heads, G queries a key, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from megalign.model_config import ModelConfig
from megalign.models.layers import RMSNorm, SplitRMSNorm, split_over_tensor_ranks
from megalign.models.packed_attention import PackedAttention, Scores
from megalign.models.rope import rotate
from megalign.models.slots import Slots

LATENT_NORM_EPS = 1e-6  # fixed in DeepSeek's code, whatever rms_norm_eps says


class Residual(MegatronModule):
    """Applies bias, post-norm and residual scale, where a model has them, to the output of attention or MLP."""

    post_norm: RMSNorm | None

    def add_last_step(self, model: ModelConfig, config: TransformerConfig) -> None:
        """Create the post-norm; called once, from `__init__`."""
        self.residual_scale = model.residual_scale
        self.post_norm = None
        if model.post_norm:
            self.post_norm = RMSNorm(
                config, model.hidden_size, model.norm_eps, offset=model.norm_offset, in_fp32=model.norm_fp32
            )

    def last_step(self, output: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (output with post-norm and scale applied, bias that Megatron still has to add)."""
        if self.post_norm is None and self.residual_scale == 1.0:
            return output, bias
        output = output if bias is None else output + bias
        output = output if self.post_norm is None else self.post_norm(output)
        return output * self.residual_scale, None


class ResidualMLP(MLP, Residual):
    """Adds the post-norm and residual scale to Megatron's MLP."""

    def __init__(self, config: TransformerConfig, submodules: Any, *, model: ModelConfig, **_: Any) -> None:
        super().__init__(config, submodules, ffn_hidden_size=model.ffn_size)
        self.add_last_step(model, config)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the MLP's output (residual not added) and the bias Megatron adds later."""
        return self.last_step(*super().forward(hidden_states, *args, **kwargs))


class Attention(Residual):
    """Computes the steps that both kinds of attention share: scores, output projection and recomputation."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, layer_number: int, pg_collection: Any) -> None:
        super().__init__(config=config)
        self.model, self.tp_group = model, pg_collection.tp
        layer = layer_number - 1
        self.rope_kind = model.rope_of(layer)
        self.interleaved = model.rope.interleaved
        scores = Scores(model.window(layer), model.attention_scale, model.attention_softcap)
        self.core_attention = PackedAttention(scores)
        recomputed = config.recompute_granularity == "selective" and "core_attn" in (config.recompute_modules or ())
        self.recomputes = bool(recomputed)
        self.linear_proj = RowParallelLinear(
            model.num_heads * model.value_dim,
            model.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=model.out_bias,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_group=self.tp_group,
        )
        if model.sinks:
            self.sinks = nn.Parameter(torch.zeros(model.num_heads // self.tp_group.size(), dtype=config.params_dtype))
            tensor_parallel.set_tensor_model_parallel_attributes(self.sinks, True, 0, 1)
        self.add_last_step(model, config)

    def column_parallel(self, columns: int, rows: int, *, bias: bool = False) -> ColumnParallelLinear:
        """Create a linear layer whose rows are sharded over tensor ranks."""
        return ColumnParallelLinear(
            columns,
            rows,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=bias,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )

    def forward(
        self, hidden_states: Tensor, *_: Any, rotary_pos_emb: Tensor, packed_seq_params: Slots, **__: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output [L or L/tp, 1, H] (residual not added) and the bias Megatron adds later.

        packed_seq_params: Megatron passes it unchanged through blocks, layers and recomputation, whatever it is.
        rotary_pos_emb: the tables of `models.rope.Rotary`.
        """
        cos_sin = None if self.rope_kind is None else rotary_pos_emb[self.rope_kind]
        inputs = [*self.heads(hidden_states, cos_sin), *([self.sinks] if self.model.sinks else [])]

        def attend(query: Tensor, key: Tensor, value: Tensor, *sinks: Tensor) -> Tensor:
            return self.core_attention(query, key, value, packed_seq_params, *sinks)

        if self.recomputes and self.training:
            context = tensor_parallel.checkpoint(attend, False, *inputs)
        else:
            context = attend(*inputs)
        return self.last_step(*self.linear_proj(context.reshape(context.shape[0], 1, -1)))

    def heads(self, hidden_states: Tensor, cos_sin: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Compute query [L, N, D], key [L, K, D] and value [L, K, V], rotary positions applied."""
        raise NotImplementedError

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return Megatron's sharded tensors of the parameters for `dist_checkpointing`."""
        sharded: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.model.sinks:
            sharded |= split_over_tensor_ranks(self, ("sinks",), prefix, sharded_offsets, metadata)
        return sharded


class GroupedAttention(Attention):
    """Computes grouped-query attention: groups of queries share a key and a value."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, *, model: ModelConfig, pg_collection: Any, **_: Any
    ) -> None:
        super().__init__(config, model, layer_number, pg_collection)
        rows = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
        self.linear_qkv = self.column_parallel(model.hidden_size, rows, bias=model.qkv_bias)
        if model.qk_norm == "head":
            self.q_layernorm, self.k_layernorm = (
                RMSNorm(config, model.head_dim, model.norm_eps, offset=model.norm_offset, in_fp32=model.norm_fp32)
                for _ in range(2)
            )
        elif model.qk_norm == "all":
            # Not called *_layernorm: Megatron sums gradients of such names over ranks, and these are sharded.
            sizes = (model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim)
            self.query_norm, self.key_norm = (
                SplitRMSNorm(config, size // self.tp_group.size(), eps=model.norm_eps, group=self.tp_group)
                for size in sizes
            )

    def heads(self, hidden_states: Tensor, cos_sin: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        model = self.model
        mixed, _ = self.linear_qkv(hidden_states)
        queries = model.num_heads // model.num_kv_heads
        mixed_LKGD = mixed.view(mixed.shape[0], -1, queries + 2, model.head_dim)
        query_LKGD, key_LK1D, value_LK1D = mixed_LKGD.split([queries, 1, 1], dim=2)
        query, key, value = query_LKGD.flatten(1, 2), key_LK1D.squeeze(2), value_LK1D.squeeze(2)
        if model.qk_norm == "head":
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        elif model.qk_norm == "all":
            query = self.query_norm(query.flatten(1)).view_as(query)
            key = self.key_norm(key.flatten(1)).view_as(key)
        if cos_sin is not None:
            query = rotate(query, cos_sin, interleaved=self.interleaved)
            key = rotate(key, cos_sin, interleaved=self.interleaved)
        return query, key, value


class LatentAttention(Attention):
    """Computes multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), without absorbed matrices.

    Projections to the latent vectors are replicated on tensor ranks; projections from them to heads are sharded.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, *, model: ModelConfig, pg_collection: Any, **_: Any
    ) -> None:
        super().__init__(config, model, layer_number, pg_collection)
        latent = model.latent
        assert latent is not None
        self.latent = latent
        query_rows = model.num_heads * model.key_dim
        if latent.query_rank is None:
            self.linear_q_proj = self.column_parallel(model.hidden_size, query_rows)
        else:
            self.linear_q_down_proj = WholeLinear(config, model.hidden_size, latent.query_rank, bias=model.qkv_bias)
            self.q_layernorm = RMSNorm(config, latent.query_rank, LATENT_NORM_EPS)
            self.linear_q_up_proj = self.column_parallel(latent.query_rank, query_rows)
        self.linear_kv_down_proj = WholeLinear(
            config, model.hidden_size, latent.rank + model.rope.dim, bias=model.qkv_bias
        )
        self.kv_layernorm = RMSNorm(config, latent.rank, LATENT_NORM_EPS)
        self.linear_kv_up_proj = self.column_parallel(
            latent.rank, model.num_heads * (latent.nope_dim + latent.value_dim)
        )

    def heads(self, hidden_states: Tensor, cos_sin: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        model, latent = self.model, self.latent
        assert cos_sin is not None
        if latent.query_rank is None:
            query, _ = self.linear_q_proj(hidden_states)
        else:
            down, _ = self.linear_q_down_proj(hidden_states)
            query, _ = self.linear_q_up_proj(self.q_layernorm(down))
        query_LND = query.view(query.shape[0], -1, model.key_dim)
        down, _ = self.linear_kv_down_proj(hidden_states)
        compressed, shared_key = down.split([latent.rank, model.rope.dim], dim=-1)
        up, _ = self.linear_kv_up_proj(self.kv_layernorm(compressed))
        key_LND, value_LNV = up.view(up.shape[0], -1, latent.nope_dim + latent.value_dim).split(
            [latent.nope_dim, latent.value_dim], dim=-1
        )
        # Every rank's heads use the one rotary key: its gradient is the sum over ranks.
        if self.config.sequence_parallel:
            shared_key = gather_from_sequence_parallel_region(shared_key, group=self.tp_group)
        elif self.tp_group.size() > 1:
            shared_key = copy_to_tensor_model_parallel_region(shared_key, group=self.tp_group)
        plain, rotary_part = query_LND.split([latent.nope_dim, model.rope.dim], dim=-1)
        query_LND = torch.cat((plain, rotate(rotary_part, cos_sin, interleaved=self.interleaved)), dim=-1)
        shared_L1D = rotate(shared_key, cos_sin, interleaved=self.interleaved)
        key_LND = torch.cat((key_LND, shared_L1D.expand(-1, key_LND.shape[1], -1)), dim=-1)
        return query_LND, key_LND, value_LNV


class WholeLinear(MegatronModule):
    """Applies a linear layer replicated on every tensor rank; returns (output, None) as Megatron's layers do."""

    def __init__(self, config: TransformerConfig, columns: int, rows: int, *, bias: bool) -> None:
        super().__init__(config=config)
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.empty(rows, dtype=config.params_dtype)) if bias else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight, self.bias), None
