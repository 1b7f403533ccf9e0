"""Layers of our own in plain torch: RMSNorm that admits sequence parallelism, and attention over packed rows.

Megatron's torch norms refuse sequence parallelism, and its local attention has no packed input. Axes: T token
positions, N heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

try:  # torch >= 2.10; used on CUDA in half precision only
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]


class RMSNorm(nn.Module):
    """x / rms(x) * weight with the statistics in fp32 or better, as Hugging Face's Llama does it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each tensor rank sees its own tokens, so Megatron must sum this gradient.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype)


class PackedAttention(MegatronModule):
    """Causal attention inside each slot of a packed row; Megatron's `core_attention` interface.

    The slots' borders (`cu_seqlens`, int32 [slots + 1]) come in as `attention_mask`, because that is the one tensor
    that Megatron hands through blocks, layers and recomputation unchanged.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **_: Any) -> None:
        super().__init__(config=config)
        self.window = config.window_size[0] + 1 if config.window_size is not None else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *_: Any, **__: Any) -> Tensor:
        """query [T, 1, N, D], key and value [T, 1, K, D] -> [T, 1, N * D]."""
        query_TND, key_TKD, value_TKD = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if query.is_cuda and varlen_attn is not None and query.dtype in (torch.bfloat16, torch.float16):
            context = _varlen(query_TND, key_TKD, value_TKD, attention_mask, self.window)
        else:
            context = _by_slot(query_TND, key_TKD, value_TKD, attention_mask, self.window)
        return context.reshape(context.shape[0], 1, -1)


def _by_slot(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """SDPA slot by slot; neighbours of equal length go together as one batch."""
    grouped = query.shape[1] != key.shape[1]
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    runs = [(length, len(list(equal))) for length, equal in itertools.groupby(lengths)]
    sizes = [length * count for length, count in runs]
    out = []
    # split, not slices: the backward of a slice fills and adds a gradient as large as the whole row, for every slot.
    parts = zip(runs, query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
    for (length, count), *slots in parts:
        q, k, v = (slot.unflatten(0, (count, length)).transpose(1, 2) for slot in slots)
        mask = _window_mask(length, window, q.device)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        out.append(context.transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Bool [length, length] of a causal sliding window that sees `window` positions; None where it sees all of them."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """torch's variable-length flash attention (CUDA, half precision)."""
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    left = -1 if window is None else window - 1
    return varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, window_size=(left, 0))  # type: ignore[no-any-return,return-value]
