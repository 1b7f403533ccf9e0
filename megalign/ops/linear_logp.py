"""Computes log-probs of target tokens from hidden states and a vocabulary-parallel head, never holding all logits.

Axes: N scored tokens, L of them on this rank (N without sequence parallelism), H hidden, V this rank's rows of the
vocabulary, R rows of a tile, C tokens of a chunk. For each chunk and tile: logits in fp32, their statistics. After the
last chunk one all-gather of `[2, N]` (more rows only for entropy or accuracy), merged as a binary tree. Nothing of
size N x V is kept: backward recomputes a block's logits from `lse_N`, or the gradient is formed while they exist.

Which function when (products: matrix products of a forward and backward pass, each over N x V x H):

| function | for | statistics collectives | products |
|---|---|---|---|
| `linear_logp` | scoring; coefficients that need the log-probs | 1 all-gather forward, 0 backward | 4 |
| `weighted_logp` with `lse_N` | known log-probs (pass 2 of two, known scores) | 0 | 3 |
| `weighted_logp` | coefficients that are constants (SFT) | 1 small all-gather a chunk, none on one rank | 3 |
| the same, logits capped (unless compiled) or a chunk's too large to keep | constant coefficients | 1 all-gather | 4 |
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalign.ops import statistics
from megalign.ops.head_blocks import HeadBlocks, HeadConfig
from megalign.ops.hidden_rows import HiddenGrad, TokenShard, chunks
from megalign.ops.logits_grad import GivenLse, Gradient, OwnLse
from megalign.ops.statistics import Statistics, Wanted
from megalign.ops.vocab import VocabShard
from megalign.ops.weight_grad import GradSink, WeightGrad

PLAIN = HeadConfig()


class TokenLogp(NamedTuple):
    """Holds results by scored token: fp32, the same on all ranks of the shard's group."""

    logp_N: Tensor
    lse_N: Tensor
    entropy_N: Tensor | None = None  # of the distribution, in nats
    correct_N: Tensor | None = None  # whether no token is likelier than the target


def linear_logp(
    hidden_LH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    shard: VocabShard,
    *,
    bias_V: Tensor | None = None,
    tokens: TokenShard | None = None,
    cfg: HeadConfig = PLAIN,
    entropy: bool = False,
    accuracy: bool = False,
    sink: GradSink | None = None,
) -> TokenLogp:
    """Return each target's log-prob and the log-sum-exp of its logits; log-probs and entropy are differentiable.

    Costs one statistics collective forward, none backward, and four matrix products. With `tokens` each rank passes the
    hidden states of its own run of tokens and gets their gradient; `target_N` covers all tokens. With `sink` dW is
    added there. Backward reads the weight tensor that was given, not a parameter behind it.
    """
    wanted = Wanted(entropy=entropy, largest=accuracy)
    logp_N, lse_N, entropy_N, correct_N = _Recompute.apply(
        hidden_LH, weight_VH, bias_V, target_N, shard, tokens, cfg, wanted, sink
    )
    return TokenLogp(logp_N, lse_N, entropy_N, correct_N)


def weighted_logp(
    hidden_LH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    coefficient_N: Tensor,
    shard: VocabShard,
    *,
    lse_N: Tensor | None = None,
    bias_V: Tensor | None = None,
    tokens: TokenShard | None = None,
    cfg: HeadConfig = PLAIN,
    accuracy: bool = False,
    sink: GradSink | None = None,
) -> tuple[Tensor, TokenLogp]:
    """Return (sum of coefficient x log-prob, log-probs); the gradient is formed while each block's logits exist.

    Costs three matrix products. With `lse_N` given there is no statistics collective; each rank's log-probs are then
    correct only for targets in its own vocabulary rows, and -lse for others. Without it, one small all-gather a chunk
    (none on one rank). Where a chunk's logits over the whole vocabulary are too large to keep, or are capped by plain
    operations, the tokens are scored first and their logits recomputed: four products.
    Only the sum is differentiable. Its upstream gradient must be the same scalar on all ranks, and 1 with a `sink`, to
    which this call itself adds dW; otherwise backward raises RuntimeError. Raises ValueError for `accuracy` with
    `lse_N`.
    """
    if accuracy and lse_N is not None:
        raise ValueError("accuracy needs a pass without lse_N: with it no rank sees the others' logits")
    trains = torch.is_grad_enabled()
    value, logp_N, lse_N, correct_N = _Weighted.apply(
        hidden_LH, weight_VH, bias_V, target_N, coefficient_N, lse_N, shard, tokens, cfg, accuracy, trains, sink
    )
    return value, TokenLogp(logp_N, lse_N, None, correct_N)


def _score(blocks: HeadBlocks, rows: Iterator[tuple[slice, Tensor]], target_N: Tensor, wanted: Wanted) -> Statistics:
    """Compute the statistics of all tokens over the whole vocabulary; one collective."""
    like_N = blocks.weight_VH.new_zeros(len(target_N), dtype=blocks.accumulation_dtype)
    tiles = [statistics.of_nothing(like_N, wanted) for _ in range(max(1, len(blocks.tiles)))]
    for part, hidden_CH in rows:
        operand_CH = blocks.operand(hidden_CH)
        for whole, tile in zip(tiles, blocks.tiles, strict=False):
            block = blocks.statistics(operand_CH, target_N[part], tile, wanted)
            for row_N, row_C in zip(whole.rows(), block.rows(), strict=True):
                row_N[part] = row_C
    # Merged for all tokens at once: vectorised kernels round a tensor's last few elements differently.
    return statistics.over_ranks(statistics.tree(tiles, statistics.merge), wanted, blocks.shard.group)


class _Recompute(torch.autograd.Function):
    """Runs one all-gather forward; backward recomputes logits block by block and reduces dH."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_LH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        shard: VocabShard,
        tokens: TokenShard | None,
        cfg: HeadConfig,
        wanted: Wanted,
        sink: GradSink | None,
    ) -> tuple[Tensor | None, ...]:
        blocks = HeadBlocks(hidden_LH.dtype, weight_VH, bias_V, shard, cfg)
        chunk = blocks.tokens_a_chunk()
        result = _score(blocks, chunks(hidden_LH, tokens, shard.group, chunk), target_N, wanted)
        correct_N = None if result.largest_N is None else result.target_N >= result.largest_N
        ctx.save_for_backward(hidden_LH, weight_VH, bias_V, target_N, result.lse_N, result.entropy_N)
        ctx.shard, ctx.tokens, ctx.cfg, ctx.chunk, ctx.sink = shard, tokens, cfg, chunk, sink
        ctx.mark_non_differentiable(*(value for value in (result.lse_N, correct_N) if value is not None))
        ctx.set_materialize_grads(False)
        return result.target_N - result.lse_N, result.lse_N, result.entropy_N, correct_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_LH, weight_VH, bias_V, target_N, lse_N, entropy_N = ctx.saved_tensors
        grad_N, entropy_grad_N = upstream[0], upstream[2]
        grad_N = torch.zeros_like(lse_N) if grad_N is None else grad_N
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wants_weight = wants_weight or ctx.sink is not None
        weight_grad = WeightGrad(weight_VH, bias_V, weight=wants_weight, bias=wants_bias, sink=ctx.sink)
        blocks = HeadBlocks(hidden_LH.dtype, weight_VH, bias_V, ctx.shard, ctx.cfg)
        grad = None
        if wants_hidden:
            grad = HiddenGrad(hidden_LH, ctx.tokens, ctx.shard.group, invariant=ctx.cfg.tp_invariant)
        entropy = None if entropy_grad_N is None else (entropy_grad_N, entropy_N)
        given = GivenLse(blocks, target_N, lse_N, grad_N, entropy)
        given.add_to(Gradient(blocks, grad, weight_grad), chunks(hidden_LH, ctx.tokens, ctx.shard.group, ctx.chunk))
        return (None if grad is None else grad.result(), *weight_grad.for_autograd(), *[None] * 6)


class _Weighted(torch.autograd.Function):
    """Forms the gradients in forward; backward scales them and reduces dH."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_LH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        coefficient_N: Tensor,
        lse_N: Tensor | None,
        shard: VocabShard,
        tokens: TokenShard | None,
        cfg: HeadConfig,
        accuracy: bool,
        trains: bool,
        sink: GradSink | None,
    ) -> tuple[Tensor | None, ...]:
        wants_hidden, wants_weight, wants_bias = (trains and needs for needs in ctx.needs_input_grad[:3])
        wants_weight = wants_weight or (trains and sink is not None)
        weight_grad = WeightGrad(weight_VH, bias_V, weight=wants_weight, bias=wants_bias, sink=sink)
        grad = HiddenGrad(hidden_LH, tokens, shard.group, invariant=cfg.tp_invariant) if wants_hidden else None
        blocks = HeadBlocks(hidden_LH.dtype, weight_VH, bias_V, shard, cfg)
        gradient = Gradient(blocks, grad, weight_grad)
        coefficient_N = coefficient_N.to(blocks.accumulation_dtype)
        result = None
        walk = partial(chunks, hidden_LH, tokens, shard.group)
        if lse_N is None and blocks.keeps_logits(len(target_N)):
            own = OwnLse(blocks, target_N, coefficient_N, Wanted(largest=accuracy))
            own.add_to(gradient, walk(blocks.tokens_a_chunk(keep_logits=True)))
            result = own.result
        elif lse_N is None:
            result = _score(blocks, walk(blocks.tokens_a_chunk()), target_N, Wanted(largest=accuracy))
            given = GivenLse(blocks, target_N, result.lse_N, coefficient_N)
            given.add_to(gradient, walk(blocks.tokens_a_chunk()))
        else:
            logit_N = torch.zeros_like(lse_N)
            given = GivenLse(blocks, target_N, lse_N, coefficient_N, logit_N=logit_N)
            given.add_to(gradient, walk(blocks.tokens_a_chunk()))
        correct_N = None
        if result is not None:
            lse_N, logit_N = result.lse_N, result.target_N
            correct_N = None if result.largest_N is None else logit_N >= result.largest_N
        assert lse_N is not None
        logp_N = logit_N - lse_N
        ctx.grad, ctx.weight_grad = grad, weight_grad
        ctx.mark_non_differentiable(*(value for value in (logp_N, lse_N, correct_N) if value is not None))
        ctx.set_materialize_grads(False)
        return (coefficient_N * logp_N).sum(), logp_N, lse_N, correct_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        scale = upstream[0]
        assert scale is not None
        if ctx.weight_grad.sink is not None:
            torch._assert_async(scale == 1, "dW is in its sink already: the upstream gradient must be 1")
        grad_LH = None if ctx.grad is None else ctx.grad.result(scale)
        return (grad_LH, *ctx.weight_grad.for_autograd(scale), *[None] * 9)
