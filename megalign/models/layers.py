"""Implements norms in plain torch that allow sequence parallelism, which Megatron's torch norms refuse."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(MegatronModule):
    """Computes x / rms(x) * (offset + weight) with the statistics in fp32 or better.

    In half precision the quotient is rounded before it is multiplied, as in Llama, or after it with `in_fp32`, as in
    Gemma and OLMo.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        offset: float = 0.0,
        in_fp32: bool = False,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.eps, self.offset, self.in_fp32 = eps, offset, in_fp32
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each tensor rank sees its own tokens, so Megatron must sum this gradient.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        full = x.dtype in (torch.float32, torch.float64)
        if x.is_cuda and not full:
            if self.in_fp32:
                return _NormInFp32.apply(x, self.weight, self.offset, self.eps)  # type: ignore[no-any-return,no-untyped-call]
            return self.weight * F.rms_norm(x, x.shape[-1:], None, self.eps)  # whose kernel computes in fp32
        weight = self.weight if full or not self.in_fp32 else self.weight.float()
        if self.offset:
            weight = self.offset + weight
        if full:
            return F.rms_norm(x, x.shape[-1:], weight, self.eps)
        if self.in_fp32:
            return F.rms_norm(x.float(), x.shape[-1:], weight, self.eps).to(x.dtype)
        return weight * F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype)


class _NormInFp32(torch.autograd.Function):
    """Computes RMSNorm in fp32 of half-precision inputs and keeps only those; a copy in fp32 is twice their size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return (x.float() * scale * (offset + weight.float())).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        grad, plain = grads[0].float(), x.float() * scale
        inner = grad * (ctx.offset + weight.float())
        into_x = (inner - plain * (inner * plain).mean(dim=-1, keepdim=True)) * scale
        into_weight = (grad * plain).flatten(0, -2).sum(dim=0)
        return into_x.to(x.dtype), into_weight.to(weight.dtype), None, None


class SplitRMSNorm(MegatronModule):
    """Computes RMSNorm over a dimension that is sharded, like its weight, over tensor ranks."""

    def __init__(self, config: TransformerConfig, size: int, *, eps: float, group: dist.ProcessGroup) -> None:
        super().__init__(config=config)
        self.eps, self.tp_group = eps, group
        self.whole = size * group.size()
        self.weight = nn.Parameter(torch.ones(size, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise this rank's part [..., size] by the statistics of the whole dimension."""
        upcast = x if x.dtype == torch.float64 else x.float()
        squares = upcast.square().sum(dim=-1, keepdim=True)
        if self.tp_group.size() > 1:
            squares = _SumBothWays.apply(squares, self.tp_group)
        return (upcast * torch.rsqrt(squares / self.whole + self.eps) * self.weight.to(upcast.dtype)).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return Megatron's sharded tensor of the weight for `dist_checkpointing`."""
        return split_over_tensor_ranks(self, ("weight",), prefix, sharded_offsets, metadata)


class _SumBothWays(torch.autograd.Function):
    """All-reduce in forward and in backward: each rank uses the sum for its own part, so gradients add up too."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = mine.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        total = upstream[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def split_over_tensor_ranks(
    module: MegatronModule,
    names: tuple[str, ...],
    prefix: str,
    sharded_offsets: tuple[Any, ...],
    metadata: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return Megatron's sharded tensors of a module's own parameters `names`, sharded along their first dimension."""
    sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        {name: module.get_parameter(name) for name in names},
        prefix,
        dict.fromkeys(names, 0),
        sharded_offsets,
        tp_group=module.tp_group,
        dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
    )
    return sharded
