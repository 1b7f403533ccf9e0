"""Gives objectives the end of a model: scored hidden states of one micro-batch and the rows of the head.

Axes: N scored tokens of a micro-batch, M of them that this rank's context group computes (fewer than N only under
context parallelism), L of those whose hidden states this rank holds (fewer than M only under sequence parallelism),
H hidden, V this rank's rows of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.ops.block_passes import choose_passes, compiler_problem, wants_compiled
from megalign.ops.head_blocks import HeadConfig, accumulation_dtype
from megalign.ops.hidden_rows import TokenShard
from megalign.ops.linear_logp import TokenLogp, linear_logp, weighted_logp
from megalign.ops.products import check_products
from megalign.ops.vocab import VocabShard
from megalign.ops.weight_grad import GradSink


def head_config(kernel: str, dtype: torch.dtype, device: torch.device, **numbers: Any) -> HeadConfig:
    """Return how a device computes the head; UserError where its torch cannot. kernel: engine.head_kernel."""
    if device.type == "cuda" and dtype != accumulation_dtype(dtype):
        check_products(device, dtype)
    return HeadConfig(compiled=choose_passes(kernel, device), **numbers)


def describe_head(kernel: str, device: torch.device) -> str:
    """Return what `engine.head_kernel` came to, in words for the log; nothing where torch computes as asked."""
    if not wants_compiled(kernel, device):
        return ""
    problem = compiler_problem(device.type)
    return ", head compiled" if problem is None else f", head not compiled ({problem})"


@dataclass(frozen=True, slots=True)
class ContextTokens:
    """Holds the indices of the scored tokens that this context rank computes, and the group with the others."""

    index_M: Tensor
    num_tokens: int
    group: dist.ProcessGroup

    def spread(self, scored: TokenLogp, *, fetch: bool) -> TokenLogp:
        """Return all N tokens: this rank's, differentiable, and the others' by one all-reduce (0 without `fetch`)."""
        present = [
            row_M for row_M in (scored.logp_N, scored.lse_N, scored.entropy_N, scored.correct_N) if row_M is not None
        ]
        whole = present[0].new_zeros(len(present), self.num_tokens)
        for row_N, row_M in zip(whole, present, strict=True):
            row_N[self.index_M] = row_M.detach().to(row_N.dtype)
        if fetch and self.num_tokens:
            dist.all_reduce(whole, group=self.group)
        rows = iter(whole)
        logp_N, lse_N = next(rows).index_copy(0, self.index_M, scored.logp_N), next(rows)
        entropy_N = None if scored.entropy_N is None else next(rows).index_copy(0, self.index_M, scored.entropy_N)
        correct_N = None if scored.correct_N is None else next(rows) > 0
        return TokenLogp(logp_N, lse_N, entropy_N, correct_N)


@dataclass(frozen=True, slots=True)
class Head:
    """Holds a micro-batch's scored hidden states and the vocabulary rows: all that an objective may use of a model.

    `weight_VH` is whatever tensor the engine has at the time: a parameter, or one gathered for this call. Backward
    reads that tensor, never a parameter behind it.
    """

    hidden_LH: Tensor
    weight_VH: Tensor
    target_M: Tensor
    shard: VocabShard
    tokens: TokenShard | None
    context: ContextTokens | None
    cfg: HeadConfig
    sink: GradSink | None = None  # takes the gradient of `weight_VH` in place of autograd
    bias_V: Tensor | None = None

    def logp(self, *, entropy: bool = False, accuracy: bool = False) -> TokenLogp:
        """Return log-probs, and entropy and accuracy if asked for, fp32 [N]; differentiable in this rank's tokens."""
        scored = linear_logp(
            self.hidden_LH,
            self.weight_VH,
            self.target_M,
            self.shard,
            bias_V=self.bias_V,
            tokens=self.tokens,
            cfg=self.cfg,
            entropy=entropy,
            accuracy=accuracy,
            sink=self.sink,
        )
        return scored if self.context is None else self.context.spread(scored, fetch=True)

    def weighted(
        self, coefficient_N: Tensor, lse_N: Tensor | None = None, *, accuracy: bool = False
    ) -> tuple[Tensor, TokenLogp]:
        """Return (this rank's part of sum(coefficient x log-prob), log-probs [N]) and form the gradient at once.

        With `lse_N`, log-probs are correct only where `formed_N` is True.
        """
        mine = slice(None) if self.context is None else self.context.index_M
        value, scored = weighted_logp(
            self.hidden_LH,
            self.weight_VH,
            self.target_M,
            coefficient_N[mine],
            self.shard,
            bias_V=self.bias_V,
            lse_N=None if lse_N is None else lse_N[mine],
            tokens=self.tokens,
            cfg=self.cfg,
            accuracy=accuracy,
            sink=self.sink,
        )
        return value, scored if self.context is None else self.context.spread(scored, fetch=lse_N is None)

    def formed_N(self) -> Tensor:
        """Return which tokens' target logits this rank has formed, bool [N]."""
        owned_M, _ = self.shard.localize(self.target_M)
        if self.context is None:
            return owned_M
        return owned_M.new_zeros(self.context.num_tokens).index_copy(0, self.context.index_M, owned_M)
