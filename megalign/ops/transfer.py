"""Moves small tensors between the host and a device with as few waits of the host as there can be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on a device; the copy goes from pinned memory, and the host does not wait for it."""
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of one dtype on the CPU, for one wait of the host in all."""
    if not any(tensor.is_cuda for tensor in tensors):
        return list(tensors)
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).cpu()
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]
