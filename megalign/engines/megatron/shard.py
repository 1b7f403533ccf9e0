"""Holds one rank's part of a model: its chunks of layers, process groups and head; no optimizer.

Axes: L positions of hidden states on this rank, H hidden, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from torch import Tensor

from megalign.data.micro_batch import ContextPart, MicroBatch
from megalign.data.packing import MicroBatchShape
from megalign.engines.head import ContextTokens, Head, head_config
from megalign.engines.megatron.groups import Groups
from megalign.engines.megatron.names import linear_layers, named_parameters
from megalign.model_config import Lora, ModelConfig
from megalign.models.experts import BalancedRouter
from megalign.models.gpt import PolicyModel, build_chunks
from megalign.models.lora import Ranks, add_adapters
from megalign.models.transformer_config import ComputeOptions, transformer_config
from megalign.ops.hidden_rows import TokenShard
from megalign.ops.transfer import to_device
from megalign.ops.vocab import VocabShard, tile_rows
from megalign.ops.weight_grad import main_grad_sink
from megalign.schema import UserError

DDP_FIELDS = frozenset(DistributedDataParallelConfig.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Selects how a model is computed; the layout comes with the groups."""

    dtype: torch.dtype
    device: torch.device
    layers: str = "torch"
    recompute: str = "none"
    temperature: float = 1.0
    chunk_tokens: int | None = None
    tp_invariant: bool = False
    head_kernel: str = "torch"
    aux_loss_coefficient: float = 0.0
    lora: Lora | None = None  # train adapters alone
    base: str | None = None  # the user's name for the model that adapters are trained on
    megatron: dict[str, Any] = field(default_factory=dict)  # passed through to Megatron's configurations
    beat: Callable[[], None] = lambda: None  # called for each micro-batch


class Shard:
    """Holds the chunks of a model that are on this rank; weights are zero until they are loaded."""

    def __init__(self, model: ModelConfig, groups: Groups, options: EngineOptions, *, seed: int = 0) -> None:
        self.model, self.groups, self.options = model, groups, options
        self.source: Path | None = None  # the Hugging Face directory that the weights came from
        passed = {key: value for key, value in options.megatron.items() if key not in DDP_FIELDS}
        compute = ComputeOptions(options.dtype, options.device, options.recompute, passed)
        self.config = transformer_config(model, groups.layout, compute)
        chunks = build_chunks(
            model, self.config, layers=options.layers, first=groups.first_stage, last=groups.last_stage
        )
        self.chunks: list[PolicyModel] = [chunk.to(options.device, options.dtype) for chunk in chunks]
        with torch.no_grad():
            for parameter in self.named_parameters().values():
                parameter.zero_()
        if options.lora is not None:
            self._add_adapters(options.lora, seed)
        self.head_cfg = head_config(
            options.head_kernel,
            options.dtype,
            options.device,
            temperature=options.temperature,
            scale=model.logit_scale,
            softcap=model.logit_softcap,
            chunk_tokens=options.chunk_tokens,
            tp_invariant=options.tp_invariant,
        )

    def _add_adapters(self, lora: Lora, seed: int) -> None:
        """Freeze the model and add adapters to its layers."""
        groups = self.groups
        ranks = Ranks(groups.tensor, groups.data_context, groups.expert_data, groups.layout.sequence)
        for chunk in self.chunks:
            layers = linear_layers(chunk, self.first_expert(groups.expert_rank))
            chunk.requires_grad_(False)
            chunk.adapters = add_adapters(layers, self.model, lora, ranks, seed=seed)
            if not chunk.adapters.by_weight:
                raise UserError(
                    f"lora: pipeline rank {groups.pipeline_rank} has a stage without layers: nothing trains there; "
                    "engine.megatron.pipeline_model_parallel_layout must give every stage a layer"
                )

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Disable the LoRA adapters inside the block."""
        adapters = [chunk.adapters for chunk in self.chunks if chunk.adapters is not None]
        for chunk_adapters in adapters:
            chunk_adapters.enabled = False
        try:
            yield
        finally:
            for chunk_adapters in adapters:
                chunk_adapters.enabled = True

    def first_expert(self, rank: int) -> int:
        """Return the number of the first expert on a rank of the expert group; 0 where the model has none."""
        return 0 if self.model.moe is None else rank * (self.model.moe.num_experts // self.groups.expert_size)

    def named_parameters(self, chunk: PolicyModel | None = None) -> dict[str, torch.nn.Parameter]:
        """Return the parameters of one chunk or of all by global name, without adapters."""
        return named_parameters(self.chunks if chunk is None else [chunk], self.first_expert(self.groups.expert_rank))

    @property
    def routers(self) -> list[BalancedRouter]:
        """Return the routers of all layers on this rank."""
        return [router for chunk in self.chunks for router in chunk.routers]

    @property
    def batch_shape(self) -> MicroBatchShape:
        """Return the shape that micro-batches must have to be split evenly over this layout's ranks."""
        groups = self.groups
        context = groups.context_size
        slots = 2 * context if context > 1 else 1
        return MicroBatchShape(
            groups.data_rank,
            groups.data_size,
            multiple_of=math.lcm(slots, context * groups.tensor_size if groups.layout.sequence else 1),
            slot_multiple_of=slots,
            min_per_rank=groups.pipeline_size if groups.virtual_size > 1 else 1,
            attention_cost=self.model.attention_cost,
        )

    def padding(self, part: ContextPart) -> Tensor:
        """Return which positions of this rank's hidden states hold no token, bool [L]."""
        padding_L = ~part.real_L
        if self.groups.layout.sequence:
            padding_L = padding_L.chunk(self.groups.tensor_size)[self.groups.tensor_rank]
        return to_device(padding_L, self.options.device)

    def head(self, batch: MicroBatch, part: ContextPart, hidden_L1H: Tensor) -> Head:
        """Return the scored hidden states of a micro-batch with this rank's rows of the vocabulary; last stage only."""
        device, groups, tokens, scored_L = self.options.device, self.groups, None, part.scored_M
        if groups.layout.sequence:
            # Tensor ranks hold equal runs of positions, but different numbers of scored ones.
            positions, rank = len(hidden_L1H), groups.tensor_rank
            borders = torch.searchsorted(part.scored_M, torch.arange(groups.tensor_size + 1) * positions)
            tokens = TokenShard(tuple(borders.diff().tolist()), rank)
            scored_L = part.scored_M[borders[rank] : borders[rank + 1]] - rank * positions
        weight = self.chunks[-1].head_weight
        rows = weight.shape[0]
        context = None
        if groups.context_size > 1:
            context = ContextTokens(to_device(part.index_M, device), len(batch.scored_N), groups.context)
        return Head(
            hidden_LH=hidden_L1H.squeeze(1).index_select(0, to_device(scored_L, device)),
            weight_VH=weight,
            target_M=to_device(part.target_M, device),
            shard=VocabShard(
                groups.tensor_rank * rows,
                rows,
                self.model.vocab_size,
                groups.tensor,
                tile_rows(self.model.padded_vocab_size, device.type),
            ),
            tokens=tokens,
            context=context,
            cfg=self.head_cfg,
            sink=main_grad_sink(weight),
        )
