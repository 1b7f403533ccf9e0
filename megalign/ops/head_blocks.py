"""Computes a vocabulary head by blocks: logits of a chunk of tokens over one tile of the vocabulary, and gradients.

Axes: C tokens of a chunk, H hidden, V this rank's rows, R rows of a tile. Logits are computed in the accumulation
dtype: fp32, or float64 for float64 inputs. Inputs of fewer bits, such as bfloat16, are called low precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalign.ops import products
from megalign.ops.block_passes import CompiledPasses, Factors
from megalign.ops.block_sizes import BLOCK_SIZES, FEWEST_KEPT
from megalign.ops.statistics import Statistics, Wanted, of_block
from megalign.ops.vocab import VocabShard


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """Configures the head's operations between its matrix product and the softmax, and how to compute them.

    logits = cap(scale x (hidden . weight + bias)) / temperature, with cap(z) = softcap x tanh(z / softcap) where given.
    chunk_tokens: tokens computed at a time; by default as many as keep a block of logits within its `BLOCK_SIZES`.
    tp_invariant: make dH bitwise equal at every tensor-parallel size; multiplies its traffic by that size.
    low_precision_grad: for low-precision inputs, round the logits' gradient once and compute dH and dW in that
    precision, for tensor cores; False computes them in fp32. Default: True on CUDA only.
    compiled: the passes over a block that torch.compile fuses; None for torch's plain operations.
    """

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    chunk_tokens: int | None = None
    tp_invariant: bool = False
    low_precision_grad: bool | None = None
    compiled: CompiledPasses | None = None

    @property
    def factor(self) -> float:
        """Return d logits / d product where the cap has slope one."""
        return self.scale / self.temperature


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which numbers of `dtype` are added up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Workspace:
    """Holds buffers that all blocks of a call share: on a CPU fresh memory costs more than the exponentials in it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[object, Tensor] = {}

    def take(self, name: object, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor of `shape`, not initialised; its memory is shared by all calls with this name."""
        flat, size = self._flat.get(name), math.prod(shape)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = torch.empty(size, dtype=dtype, device=self.device)
        return flat[:size].view(shape)


class HeadBlocks:
    """Holds one call's head and computes its blocks: matrix products, scaling and cap, gradients."""

    def __init__(
        self, hidden_dtype: torch.dtype, weight_VH: Tensor, bias_V: Tensor | None, shard: VocabShard, cfg: HeadConfig
    ) -> None:
        self.weight_VH, self.bias_V, self.shard, self.cfg = weight_VH, bias_V, shard, cfg
        self.tiles = shard.tiles
        self.accumulation_dtype = accumulation_dtype(hidden_dtype)
        self.on_cuda = device_type(weight_VH) == "cuda"
        self.hidden_dtype = hidden_dtype
        self.low_precision = hidden_dtype != self.accumulation_dtype
        self._held_factors: Factors | None = None
        self.exact_as_bfloat16 = hidden_dtype == weight_VH.dtype == torch.bfloat16 and not self.on_cuda
        self.low_precision_grad = self.low_precision and (
            self.on_cuda if cfg.low_precision_grad is None else cfg.low_precision_grad
        )
        self.sizes = BLOCK_SIZES["cuda" if self.on_cuda else "cpu"]
        self.workspace = Workspace(weight_VH.device)
        self.compiled = None if cfg.compiled is None or cfg.compiled.failed else cfg.compiled

    def tokens_a_chunk(self, *, keep_logits: bool = False) -> int:
        """Return a chunk's number of tokens, the same at every tensor-parallel size: numbers may depend on it."""
        if self.cfg.chunk_tokens:
            return self.cfg.chunk_tokens
        if keep_logits:
            fitting = self.sizes.kept_bytes // (4 * self.shard.vocab_size)
        else:
            fitting = self.sizes.block_bytes // (4 * self.shard.rows_a_tile)
        return max(16, min(self.sizes.most_chunk_tokens, fitting))

    def keeps_logits(self, num_tokens: int) -> bool:
        """Tell whether a chunk's logits over the whole vocabulary are kept until its statistics are known."""
        if self.cfg.softcap is not None and self.compiled is None:
            return False  # plain operations keep exponentials, and the cap's slope is not in them
        return bool(self.cfg.chunk_tokens) or self.tokens_a_chunk(keep_logits=True) >= min(FEWEST_KEPT, num_tokens)

    def operand(self, hidden_CH: Tensor) -> Tensor:
        """Return a chunk's hidden states as operand of the logits' product: on a CPU in the accumulation dtype."""
        if self.on_cuda or not self.low_precision:
            return hidden_CH
        return self.workspace.take("hidden", hidden_CH.shape, self.accumulation_dtype).copy_(hidden_CH)

    def weight(self, tile: slice) -> Tensor:
        """Return a tile's weight rows as operand of the logits' product."""
        weight_RH = self.weight_VH[tile]
        if self.on_cuda or not self.low_precision:
            return weight_RH
        return self.workspace.take("weight", weight_RH.shape, self.accumulation_dtype).copy_(weight_RH)

    def product(self, operand_CH: Tensor, weight_RH: Tensor, *, name: object = "logits") -> Tensor:
        """Return hidden . weight [C, R], in the workspace."""
        product_CR = self.workspace.take(name, (len(operand_CH), len(weight_RH)), self.accumulation_dtype)
        if self.on_cuda and self.low_precision:
            return products.product(operand_CH, weight_RH.t(), product_CR)
        with bfloat16_products(wanted=self.exact_as_bfloat16):
            return torch.mm(operand_CH, weight_RH.t(), out=product_CR)

    def logits(self, product_CR: Tensor, tile: slice) -> tuple[Tensor, Tensor | None]:
        """Overwrite a block's product by (logits [C, R], slope of the cap [C, R] or None) and return them."""
        logits_CR = product_CR
        if self.bias_V is not None:
            logits_CR.add_(self.bias_V[tile])
        if self.cfg.softcap is None:
            return (logits_CR if self.cfg.factor == 1.0 else logits_CR.mul_(self.cfg.factor)), None
        logits_CR.mul_(self.cfg.scale / self.cfg.softcap).tanh_()
        slope_CR = self.workspace.take("slope", logits_CR.shape, self.accumulation_dtype)
        torch.mul(logits_CR, logits_CR, out=slope_CR).neg_().add_(1.0)
        return logits_CR.mul_(self.cfg.softcap / self.cfg.temperature), slope_CR

    def statistics(
        self, operand_CH: Tensor, target_C: Tensor, tile: slice, wanted: Wanted, *, name: object = "logits"
    ) -> Statistics:
        """Return a block's statistics; the workspace then holds exp(logit - largest), or the product if compiled."""
        product_CR, target = self.product(operand_CH, self.weight(tile), name=name), self.shard.localize(target_C, tile)
        if self.compiled is not None:
            return self.compiled.statistics(product_CR, self._bias(tile), self._factors(), *target, wanted=wanted)
        logits_CR, _ = self.logits(product_CR, tile)
        scratch = partial(self.workspace.take, "scratch", logits_CR.shape, self.accumulation_dtype)
        return of_block(logits_CR, *target, wanted, scratch)

    def compiled_grad(
        self, product_CR: Tensor, tile: slice, target: tuple[Tensor, Tensor], *of_tokens: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (operand of the products for dH and dW, the targets' logits, the bias's gradient).

        of_tokens: log-sum-exp, coefficient and entropy as `gradient_pass` takes them.
        """
        assert self.compiled is not None
        dtype = self.hidden_dtype if self.low_precision_grad else self.accumulation_dtype
        of_tile = (product_CR, self._bias(tile), self._factors(), *target)
        return self.compiled.gradient(*of_tile, *of_tokens, dtype=dtype)

    def _bias(self, tile: slice) -> Tensor | None:
        return None if self.bias_V is None else self.bias_V[tile].detach()

    def _factors(self) -> Factors:
        """Return the factors before and after the cap as tensors on the device."""
        if self._held_factors is None:
            number = partial(torch.full, (), dtype=self.accumulation_dtype, device=self.weight_VH.device)
            cap = self.cfg.softcap
            if cap is None:
                self._held_factors = number(self.cfg.factor), None
            else:
                self._held_factors = number(self.cfg.scale / cap), number(cap / self.cfg.temperature)
        return self._held_factors

    def grad_weight(self, tile: slice, weight_RH: Tensor | None = None) -> Tensor:
        """Return a tile's weight rows as operand of dH's product; weight_RH: those of the logits' product, if held."""
        if self.low_precision_grad:
            return self.weight_VH[tile]
        return self.weight(tile) if weight_RH is None else weight_RH

    def hidden_grad(self, grad_CR: Tensor, weight_RH: Tensor, sum_CH: Tensor) -> None:
        """Add a block's part of dH to `sum_CH`."""
        if not self.low_precision_grad:
            sum_CH.addmm_(grad_CR, weight_RH.to(self.accumulation_dtype))
        elif self.on_cuda:
            products.add_product(sum_CH, grad_CR, weight_RH, partial(self._part, sum_CH))
        else:
            part_CH = self.workspace.take("dH", sum_CH.shape, weight_RH.dtype)
            sum_CH.add_(torch.mm(grad_CR, weight_RH, out=part_CH))

    def weight_grad(self, grad_CR: Tensor, hidden_CH: Tensor, sum_RH: Tensor) -> None:
        """Add a block's dW to `sum_RH`."""
        if not self.low_precision_grad:
            sum_RH.addmm_(grad_CR.t(), hidden_CH.to(self.accumulation_dtype))
        elif self.on_cuda:
            products.add_product(sum_RH, grad_CR.t(), hidden_CH, partial(self._part, sum_RH))
        else:
            # On a CPU the low-precision product is twice as fast with a contiguous transposed copy.
            grad_RC = self.workspace.take("transposed", grad_CR.t().shape, grad_CR.dtype).copy_(grad_CR.t())
            part_RH = self.workspace.take("dW", sum_RH.shape, hidden_CH.dtype)
            sum_RH.add_(torch.mm(grad_RC, hidden_CH, out=part_RH))

    def _part(self, total: Tensor) -> Tensor:
        return self.workspace.take("part", total.shape, total.dtype)

    def grad_operand(self, grad_CR: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the logits' gradient as operand of the products that give dH and dW."""
        if not self.low_precision_grad or grad_CR.dtype == dtype:
            return grad_CR
        return self.workspace.take("grad", grad_CR.shape, dtype).copy_(grad_CR)


def device_type(weight_VH: Tensor) -> str:
    """Return the kind of device that computes a head."""
    return weight_VH.device.type


@contextmanager
def bfloat16_products(*, wanted: bool) -> Iterator[None]:
    """Let a CPU round fp32 operands to bfloat16 and sum in fp32: exact for operands that came from bfloat16.

    torch has no CPU product of bfloat16 with an fp32 result; this oneDNN switch is the only way to get fp32 logits
    faster than by fp32 products. Processors without bfloat16 products ignore it.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if wanted:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        if wanted:
            matmul.fp32_precision = before
