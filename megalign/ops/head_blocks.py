"""A vocabulary head by blocks: the logits of a chunk of tokens over one tile of the vocabulary, and their gradient.

Axes: C tokens of a chunk, H hidden, V this rank's rows, R rows of a tile. Logits are fp32 (float64 for float64 inputs)
whatever the inputs are. "Narrow" inputs are those of fewer bits than that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalign.ops.vocab import VocabShard

# Memory for the logits of one block. On a CPU more gains nothing; a GPU wants larger products.
BLOCK_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}
# Memory for the logits of one chunk over a whole vocabulary, where a form has to keep them.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}

# More tokens a chunk gain nothing.
MOST_CHUNK_TOKENS = 2048
# Tokens of such a chunk below which four products over larger chunks are taken. Three were faster at 524 tokens and
# slower at 110 (benchmarks/logp.py, one CPU thread); where between they cross was not measured.
FEWEST_KEPT = 512


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """What a head does between its product and the softmax, and how it is to be computed.

    logits = cap(scale x (hidden . weight + bias)) / temperature, with cap(z) = softcap x tanh(z / softcap) where given.
    chunk_tokens: tokens computed at a time, by default what keeps a block of logits within a fixed memory.
    tp_invariant: dH is the same to the bit at every tensor-parallel size; costs tensor-parallel size x its traffic.
    narrow_grad: narrow inputs take their gradient's products narrow too, as tensor cores want them, and round the
    logits' gradient once; else those products are fp32. By default on CUDA only.
    into_main_grad: dW is added into the weight's fp32 `main_grad` (Megatron) where there is one.
    """

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    chunk_tokens: int | None = None
    tp_invariant: bool = False
    narrow_grad: bool | None = None
    into_main_grad: bool = False

    @property
    def factor(self) -> float:
        """d logits / d product where the cap has slope one."""
        return self.scale / self.temperature


def wide(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a dtype are added up in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Room:
    """Buffers that all blocks of a call share: on a CPU fresh memory costs more than the exponentials in it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[object, Tensor] = {}

    def take(self, name: object, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Contiguous, with whatever its last user left in it."""
        flat, size = self._flat.get(name), math.prod(shape)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = torch.empty(size, dtype=dtype, device=self.device)
        return flat[:size].view(shape)


class HeadBlocks:
    """One call's head: products, and what stands between them and the softmax."""

    def __init__(
        self, hidden_dtype: torch.dtype, weight_VH: Tensor, bias_V: Tensor | None, shard: VocabShard, cfg: HeadConfig
    ) -> None:
        self.weight_VH, self.bias_V, self.shard, self.cfg = weight_VH, bias_V, shard, cfg
        self.tiles = shard.tiles
        self.wide = wide(hidden_dtype)
        self.on_cuda = weight_VH.is_cuda
        self.narrow = hidden_dtype != self.wide
        self.exact_as_bfloat16 = hidden_dtype == weight_VH.dtype == torch.bfloat16 and not self.on_cuda
        self.narrow_grad = self.narrow and (self.on_cuda if cfg.narrow_grad is None else cfg.narrow_grad)
        self.room = Room(weight_VH.device)

    def tokens_a_chunk(self, *, keep_logits: bool = False) -> int:
        """Tokens of a chunk; the same at every tensor-parallel size, because numbers may depend on it."""
        if self.cfg.chunk_tokens:
            return self.cfg.chunk_tokens
        device = "cuda" if self.on_cuda else "cpu"
        if keep_logits:
            fitting = CHUNK_BYTES[device] // (4 * self.shard.vocab_size)
        else:
            fitting = BLOCK_BYTES[device] // (4 * self.shard.rows_a_tile)
        return max(16, min(MOST_CHUNK_TOKENS, fitting))

    def keeps_logits(self, num_tokens: int) -> bool:
        """Whether a chunk's logits over the whole vocabulary are kept until its statistics are known."""
        if self.cfg.softcap is not None:
            return False  # the cap's slope is not in the exponentials
        return bool(self.cfg.chunk_tokens) or self.tokens_a_chunk(keep_logits=True) >= min(FEWEST_KEPT, num_tokens)

    def operand(self, hidden_CH: Tensor) -> Tensor:
        """A chunk's hidden states as the logits' products take them (a wide copy for narrow ones on a CPU)."""
        if self.on_cuda or not self.narrow:
            return hidden_CH
        return self.room.take("hidden", hidden_CH.shape, self.wide).copy_(hidden_CH)

    def weight(self, tile: slice) -> Tensor:
        """A tile's rows as the logits' products take them."""
        weight_RH = self.weight_VH[tile]
        if self.on_cuda or not self.narrow:
            return weight_RH
        return self.room.take("weight", weight_RH.shape, self.wide).copy_(weight_RH)

    def logits(
        self, operand_CH: Tensor, weight_RH: Tensor, tile: slice, *, name: object = "logits"
    ) -> tuple[Tensor, Tensor | None]:
        """(logits [C, R], slope of the cap [C, R] where there is one) in the shared buffers."""
        logits_CR = self.room.take(name, (len(operand_CH), len(weight_RH)), self.wide)
        if self.on_cuda and self.narrow:
            torch.mm(operand_CH, weight_RH.t(), out_dtype=torch.float32, out=logits_CR)
        else:
            with bfloat16_products(wanted=self.exact_as_bfloat16):
                torch.mm(operand_CH, weight_RH.t(), out=logits_CR)
        if self.bias_V is not None:
            logits_CR.add_(self.bias_V[tile])
        if self.cfg.softcap is None:
            return (logits_CR if self.cfg.factor == 1.0 else logits_CR.mul_(self.cfg.factor)), None
        logits_CR.mul_(self.cfg.scale / self.cfg.softcap).tanh_()
        slope_CR = self.room.take("slope", logits_CR.shape, self.wide)
        torch.mul(logits_CR, logits_CR, out=slope_CR).neg_().add_(1.0)
        return logits_CR.mul_(self.cfg.softcap / self.cfg.temperature), slope_CR

    def hidden_grad(self, grad_CR: Tensor, weight_RH: Tensor, sum_CH: Tensor) -> None:
        """Add a block's part of dH to `sum_CH`."""
        if not self.narrow_grad:
            sum_CH.addmm_(grad_CR, weight_RH.to(self.wide))
        elif self.on_cuda:
            torch.addmm(sum_CH, grad_CR, weight_RH, out_dtype=torch.float32, out=sum_CH)
        else:
            part_CH = self.room.take("dH", sum_CH.shape, weight_RH.dtype)
            sum_CH.add_(torch.mm(grad_CR, weight_RH, out=part_CH))

    def weight_grad(self, grad_CR: Tensor, hidden_CH: Tensor, sum_RH: Tensor) -> None:
        """Add a block's dW to `sum_RH`."""
        if not self.narrow_grad:
            sum_RH.addmm_(grad_CR.t(), hidden_CH.to(self.wide))
        elif self.on_cuda:
            torch.addmm(sum_RH, grad_CR.t(), hidden_CH, out_dtype=torch.float32, out=sum_RH)
        else:
            # A CPU's narrow product is twice as fast over a copy that lies in the order it is read.
            grad_RC = self.room.take("transposed", grad_CR.t().shape, grad_CR.dtype).copy_(grad_CR.t())
            part_RH = self.room.take("dW", sum_RH.shape, hidden_CH.dtype)
            sum_RH.add_(torch.mm(grad_RC, hidden_CH, out=part_RH))

    def narrowed(self, grad_CR: Tensor, dtype: torch.dtype) -> Tensor:
        """The logits' gradient as its products take it."""
        if not self.narrow_grad:
            return grad_CR
        return self.room.take("narrow", grad_CR.shape, dtype).copy_(grad_CR)


@contextmanager
def bfloat16_products(*, wanted: bool) -> Iterator[None]:
    """Let a CPU multiply fp32 numbers as bfloat16 with fp32 sums and result: exact for widened bfloat16.

    torch has no CPU product of bfloat16 into fp32; this switch of oneDNN's is the one way to fp32 logits at more than
    the speed of fp32. Processors without such products ignore it.
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
