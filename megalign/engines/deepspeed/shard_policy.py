"""Runs a tensor-parallel shard of a model of Megatron-Core under ZeRO; the one file here that knows Megatron's engine.

Axes: L positions of a packed row, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor, nn

from megalign.config.job import JobConfig
from megalign.config.layout import Layout
from megalign.convert.hf.model import HFModel
from megalign.data.micro_batch import MicroBatch, contiguous_part
from megalign.engines.build import chunk_tokens_of, dtype_of, lora_of, temperature_of
from megalign.engines.deepspeed.policy import LossOfHead, gathered
from megalign.engines.deepspeed.split_layers import sum_gradient
from megalign.engines.megatron.groups import Groups, make_groups
from megalign.engines.megatron.names import linear_layers
from megalign.engines.megatron.shard import EngineOptions, Shard
from megalign.models.lora import plain_strides
from megalign.models.slots import Slots
from megalign.ops.transfer import to_device
from megalign.runtime import cpu_shims

HEAD_NORMS = (".q_layernorm.weight", ".k_layernorm.weight")


class ShardPolicy(nn.Module):
    """Wraps this rank's shard and computes losses of its head's input, one micro-batch at a time."""

    packs = True

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self.shard = shard
        (self.chunk,) = shard.chunks
        self.dtype = shard.options.dtype
        # Found before ZeRO-3 partitions it: to ask the module for it later would gather it for the whole pass.
        self.head_parameters: list[Any] = [self.chunk.head_weight]

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        """Return what `compute` does: all use of the shard is inside this call, around which ZeRO has its hooks."""
        return compute()

    def loss(self, batch: MicroBatch, loss_of_head: LossOfHead) -> Tensor:
        """Return the loss that `loss_of_head` computes from the head's inputs; called inside `forward`."""
        part, device = contiguous_part(batch, 0, 1), self.shard.options.device
        hidden_L1H = self.chunk(
            to_device(part.token_L, device),
            to_device(part.position_L, device),
            to_device(part.length_L, device),
            Slots(batch.cu_seqlens, device),
        )
        with gathered(self.head_parameters, keep=torch.is_grad_enabled()):
            return loss_of_head(self.shard.head(batch, part, hidden_L1H))


def make_shard_groups(layout: Layout, *, timeout_s: float) -> Groups:
    """Create the process groups that Megatron's layers use; call on every rank."""
    return make_groups(layout, timeout_s=timeout_s)


def build_shard_policy(
    cfg: JobConfig, model: HFModel, groups: Groups, device: torch.device, *, trainable: bool
) -> ShardPolicy:
    """Build this rank's shard; its weights are zero."""
    cpu_shims.install()
    model_parallel_cuda_manual_seed(cfg.run.seed)
    options = EngineOptions(
        dtype=dtype_of(cfg),
        device=device,
        layers="torch",
        recompute=cfg.engine.recompute if trainable else "none",
        temperature=temperature_of(cfg),
        chunk_tokens=chunk_tokens_of(cfg),
        tp_invariant=cfg.engine.tp_invariant,
        head_kernel=cfg.engine.head_kernel,
        lora=lora_of(cfg) if trainable else None,
        base=cfg.model.path,
    )
    shard = Shard(model.known(), groups, options, seed=cfg.run.seed)
    if not trainable:
        (chunk,) = shard.chunks
        chunk.requires_grad_(False)
        for layer in linear_layers(chunk, 0).values():  # so that it gives the bits of a shard that trains
            layer.register_forward_pre_hook(plain_strides)
    if model.known().qk_norm == "head":
        _sum_head_norms(shard)
    return ShardPolicy(shard)


def _sum_head_norms(shard: Shard) -> None:
    """Sum gradients of norms that every rank has and applies to its own heads; Megatron's DDP is not here to do it."""
    for name, parameter in shard.named_parameters().items():
        if name.endswith(HEAD_NORMS) and parameter.requires_grad:
            sum_gradient(parameter, shard.groups.tensor)
