"""Stand-ins for CUDA kernels that a CPU lacks, or that check or round otherwise there; with those kernels' checks."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
SDPA: collections.Counter[str] = collections.Counter()  # calls by the back end that CUDA would choose
REPEATED: collections.Counter[str] = collections.Counter()  # calls of flash attention with repeated keys
FLASH_SIZES = collections.Counter[int]()  # heads' sizes that flash attention was called with


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _mm_out(self: Tensor, mat2: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    _require(self.dtype == mat2.dtype and self.dtype in HALF and out.dtype == out_dtype == torch.float32, "mm: dtypes")
    return out.copy_(self.float() @ mat2.float())


def _addmm_out(
    self: Tensor, mat1: Tensor, mat2: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor
) -> Tensor:
    """torch 2.8 and 2.9 want `self` in the operands' dtype."""
    _require(
        mat1.dtype == mat2.dtype and mat1.dtype in HALF and out.dtype == out_dtype == torch.float32, "addmm: dtypes"
    )
    _require(self.dtype == out_dtype, "addmm: self must have the result's dtype")
    return out.copy_(beta * self + alpha * (mat1.float() @ mat2.float()))


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute attention plainly and note which back end CUDA would have taken."""
    half, grouped = query.dtype in HALF, query.shape[-3] != key.shape[-3]
    flash = half and query.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0 and attn_mask is None
    # The math back end holds all scores, in fp32 for half precision: the memory of a whole score matrix.
    SDPA["flash" if flash else "math" if grouped else "efficient"] += 1
    if grouped:
        _require(enable_gqa, "scaled_dot_product_attention: numbers of heads differ")
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
    exact = query.dtype if query.dtype == torch.float64 else torch.float32
    scores = (query.to(exact) @ key.to(exact).transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return (scores.softmax(-1) @ value.to(exact)).to(query.dtype)


def _by_sequence(
    query: Tensor, key: Tensor, value: Tensor, borders: tuple[Tensor, Tensor], scale: float, window: tuple[int, int]
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor, Tensor]]:
    """Yield each sequence's (queries, keys, query, key, value, scores) in fp32; queries align with the last keys."""
    of_query, of_key = (border.tolist() for border in borders)
    for number in range(len(of_query) - 1):
        rows, columns = slice(*of_query[number : number + 2]), slice(*of_key[number : number + 2])
        q, k, v = (x.float().transpose(0, 1) for x in (query[rows], key[columns], value[columns]))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        scores = q @ k.transpose(1, 2) * scale
        row = torch.arange(scores.shape[1])[:, None] + scores.shape[2] - scores.shape[1]
        column = torch.arange(scores.shape[2])
        mask = torch.ones(scores.shape[1:], dtype=torch.bool)
        if window[0] >= 0:
            mask &= column >= row - window[0]
        if window[1] >= 0:
            mask &= column <= row + window[1]
        yield rows, columns, q, k, v, scores.masked_fill(~mask, -torch.inf)


def _check_flash(
    query: Tensor, key: Tensor, value: Tensor, borders: tuple[Tensor, Tensor], longest: tuple[int, int]
) -> None:
    size = query.shape[-1]
    FLASH_SIZES[size] += 1
    heads = key.transpose(0, 1)
    REPEATED["keys"] += len(heads) > 1 and bool((heads[0] == heads[1]).all())
    _require(query.dtype in HALF, "FlashAttention only supports fp16 and bf16 data type")
    _require(key.shape[-1] == value.shape[-1] == size, "flash attention: query, key and value must have one head size")
    _require(size <= 256, "FlashAttention forward only supports head dimension at most 256")
    _require(size % 8 == 0, "head_size should be a multiple of 8")
    _require(query.shape[1] % key.shape[1] == 0, "flash attention: heads must be a multiple of key heads")
    _require(all(border.dtype == torch.int32 for border in borders), "cu_seqlens must have dtype int32")
    _require(all(x.stride(-1) == 1 for x in (query, key, value)), "flash attention: last dimension must be contiguous")
    for border, most in zip(borders, longest, strict=True):
        _require(int(border.diff().max()) == most, "flash attention: the longest sequence is not the one given")


def _sides(causal: bool, left: int | None, right: int | None) -> tuple[int, int]:
    left = -1 if left is None else left
    return left, 0 if causal else (-1 if right is None else right)


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float | None,
    window: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    _check_flash(query, key, value, borders, longest)
    out, lse = torch.empty_like(query), torch.empty(query.shape[1], query.shape[0])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    for rows, _, _, _, v, scores in _by_sequence(query, key, value, borders, scale, window):
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = (scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype)
    return out, lse, torch.zeros(2, dtype=torch.uint64)


def _flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    borders: tuple[Tensor, Tensor],
    scale: float | None,
    window: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    for rows, columns, q, k, v, scores in _by_sequence(query, key, value, borders, scale, window):
        share = (scores - lse[:, rows, None]).exp()
        upstream, result = (x[rows].float().transpose(0, 1) for x in (grad, out))
        inner = share * (upstream @ v.transpose(1, 2) - (upstream * result).sum(-1, keepdim=True))
        repeats = q.shape[0] // key.shape[1]
        dq[rows] = (inner @ k * scale).transpose(0, 1).to(query.dtype)
        for into, per_head in ((dk, inner.transpose(1, 2) @ q * scale), (dv, share.transpose(1, 2) @ upstream)):
            into[columns] = per_head.unflatten(0, (-1, repeats)).sum(1).transpose(0, 1).to(key.dtype)
    return dq, dk, dv


def _aten_flash(
    q: Tensor, k: Tensor, v: Tensor, cq: Tensor, ck: Tensor, mq: int, mk: int, dropout: float, causal: bool,
    return_debug_mask: bool = False, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None, **other: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    sides = _sides(causal, window_size_left, window_size_right)
    return *_flash_forward(q, k, v, (cq, ck), (mq, mk), scale, sides), torch.zeros(0), torch.zeros(0)


def _aten_flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cq: Tensor, ck: Tensor, mq: int, mk: int,
    dropout: float, causal: bool, rng: Tensor, unused: Any, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    sides = _sides(causal, window_size_left, window_size_right)
    return _flash_backward(grad, q, k, v, out, lse, (cq, ck), scale, sides)


def _in_random_order(add: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """CUDA adds with atomics, in the dtype of the result and in an order that differs between equal calls."""

    def scatter(self: Tensor, dim: int, index: Tensor, source: Tensor, **options: Any) -> Tensor:
        where = dim if index.dim() == source.dim() else 0  # index_add_ has a plain list of rows
        order = torch.randperm(index.shape[where])
        if self.dtype in HALF and dim == 0 and not options:  # a CPU would add in fp32 and round once
            into = self if add._schema.name.endswith("_") else self.clone()  # type: ignore[attr-defined]
            for row in order.tolist():
                at = index[row].flatten()[0] if index.dim() > 1 else index[row]
                into[at] += source[row]
            return into
        return add(self, dim, index.index_select(where, order), source.index_select(dim, order), **options)

    return scatter


def _no_deterministic(operator: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Refuse floats in deterministic mode, as CUDA does."""

    def run(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.are_deterministic_algorithms_enabled() and self.is_floating_point():
            raise RuntimeError(f"{name} does not have a deterministic implementation, but you set True")
        return operator(self, *args, **kwargs)

    return run


OPERATORS: dict[Any, Callable[..., Any]] = {
    aten.mm.dtype_out: _mm_out,
    aten.addmm.dtype_out: _addmm_out,
    aten._flash_attention_forward.default: _aten_flash,
    aten._flash_attention_backward.default: _aten_flash_backward,
    aten.scatter_add_.default: _in_random_order(aten.scatter_add_.default),
    aten.scatter_add.default: _in_random_order(aten.scatter_add.default),
    aten.index_add_.default: _in_random_order(aten.index_add_.default),
    aten.index_add.default: _in_random_order(aten.index_add.default),
    aten.cumsum.default: _no_deterministic(aten.cumsum.default, "cumsum_cuda_kernel"),
}
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.scaled_dot_product_attention: scaled_dot_product_attention
}
