"""Computes the gradient's norm on the device; without TransformerEngine Megatron reads each tensor's on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import clip_grads
from torch import Tensor


def use_device_norm() -> None:
    """Have Megatron compute norms by `norm_on_device` where it has only its slow stand-in for a fused kernel."""
    if clip_grads.l2_norm_impl.__module__ == "megatron.core.utils":
        clip_grads.l2_norm_impl = norm_on_device


def norm_on_device(
    chunk_size: int, overflow: Tensor, tensor_lists: Sequence[Sequence[Tensor]], per_tensor: bool, *_: Any
) -> tuple[Tensor, None]:
    """Return the L2 norm [1] of all tensors together; the arguments are those of the fused kernel."""
    norms = torch._foreach_norm([each for tensors in tensor_lists for each in tensors])
    return torch.linalg.vector_norm(torch.stack(norms)).reshape(1), None
