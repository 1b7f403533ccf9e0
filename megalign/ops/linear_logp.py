"""Log-probs of target tokens from hidden states and a vocabulary-parallel head, without ever holding all logits.

Axes: N scored tokens, L of them on this rank (N without sequence parallelism), H hidden, V this rank's rows of the
vocabulary, R rows of a tile, C tokens of a chunk. For each chunk and tile: logits in fp32, their statistics. After the
last chunk one all-gather of `[2, N]` (more rows only for entropy or accuracy), merged as a binary tree. Nothing of
size N x V is kept: backward recomputes a block's logits from `lse_N`, or the gradient is formed while they exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalign.ops import statistics
from megalign.ops.head_blocks import HeadBlocks, HeadConfig
from megalign.ops.hidden_rows import HiddenGrad, TokenShard, chunks
from megalign.ops.statistics import Statistics, TreeSum, Wanted
from megalign.ops.vocab import VocabShard
from megalign.ops.weight_grad import WeightGrad

PLAIN = HeadConfig()
# (tile, its place) -> (gradient of the block's products, weight operand)
_Blocks = Callable[[slice, int], tuple[Tensor, Tensor]]


class TokenLogp(NamedTuple):
    """Of each scored token, fp32, the same on all ranks of the shard's group."""

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
) -> TokenLogp:
    """Log-prob of each target with the log-sum-exp of its logits; differentiable in log-probs and entropy.

    One statistics collective forward, none backward, four matrix products together. With `tokens` each rank brings the
    hidden states of its own run of tokens and gets their gradient; `target_N` is of all tokens.
    """
    wanted = Wanted(entropy=entropy, largest=accuracy)
    logp_N, lse_N, entropy_N, correct_N = _Recompute.apply(
        hidden_LH, weight_VH, bias_V, target_N, shard, tokens, cfg, wanted
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
) -> tuple[Tensor, TokenLogp]:
    """(sum of coefficient x log-prob, log-probs): the gradient is formed while each block's logits exist.

    Three matrix products. With `lse_N` given, no statistics collective at all; the log-probs then are, on each rank,
    right where the target is owned and -lse elsewhere. Without it, one small all-gather a chunk (none on one rank); but
    where the logits of a chunk over the whole vocabulary are too much to keep, or are capped, the tokens are scored
    first, as in the recompute form.
    Only the sum is differentiable. Its upstream gradient must be a scalar the same on all ranks, and 1 where dW goes
    into `main_grad`, which it reaches in this call; otherwise backward raises RuntimeError. Raises ValueError for
    `accuracy` with `lse_N`.
    """
    if accuracy and lse_N is not None:
        raise ValueError("accuracy needs a pass without lse_N: with it no rank sees the others' logits")
    trains = torch.is_grad_enabled()
    value, logp_N, lse_N, correct_N = _Weighted.apply(
        hidden_LH, weight_VH, bias_V, target_N, coefficient_N, lse_N, shard, tokens, cfg, accuracy, trains
    )
    return value, TokenLogp(logp_N, lse_N, None, correct_N)


def _block_statistics(
    blocks: HeadBlocks, logits_CR: Tensor, target: tuple[Tensor, Tensor], wanted: Wanted
) -> Statistics:
    scratch = partial(blocks.room.take, "scratch", logits_CR.shape, blocks.wide)
    return statistics.of_block(logits_CR, *target, wanted, scratch)


def _score(blocks: HeadBlocks, rows: Iterator[tuple[slice, Tensor]], target_N: Tensor, wanted: Wanted) -> Statistics:
    """Statistics of all tokens over the whole vocabulary; one collective."""
    like_N = blocks.weight_VH.new_zeros(len(target_N), dtype=blocks.wide)
    tiles = [statistics.of_nothing(like_N, wanted) for _ in range(max(1, len(blocks.tiles)))]
    for part, hidden_CH in rows:
        operand_CH = blocks.operand(hidden_CH)
        for whole, tile in zip(tiles, blocks.tiles, strict=False):
            logits_CR, _ = blocks.logits(operand_CH, blocks.weight(tile), tile)
            block = _block_statistics(blocks, logits_CR, blocks.shard.localize(target_N[part], tile), wanted)
            for row_N, row_C in zip(whole.rows(), block.rows(), strict=True):
                row_N[part] = row_C
    # Only now, over all tokens at once: vectorised kernels round the last few elements otherwise than the rest.
    return statistics.over_ranks(statistics.tree(tiles, statistics.merge), wanted, blocks.shard.group)


class _Gradient:
    """One call's gradient, block by block; the logits' gradient is coefficient x (onehot - p), and entropy's."""

    def __init__(self, blocks: HeadBlocks, grad: HiddenGrad | None, sink: WeightGrad) -> None:
        self.blocks, self.grad, self.sink = blocks, grad, sink

    def chunk(
        self,
        part: slice,
        hidden_CH: Tensor,
        operand_CH: Tensor,
        blocks_of_chunk: _Blocks,
        *,
        sign_C: Tensor | None = None,
    ) -> None:
        """Add a chunk's dH and dW; `sign_C` of each token is still to be put on its row of the logits' gradient."""
        blocks, grad = self.blocks, self.grad
        partial_CH = None if grad is None else grad.zeros(part)
        tree = TreeSum() if grad is not None and grad.invariant else None
        factor_CH = hidden_CH if blocks.narrow_grad else operand_CH
        if sign_C is not None:
            factor_CH = factor_CH * sign_C[:, None].to(factor_CH.dtype)
        for place, tile in enumerate(blocks.tiles):
            grad_CR, weight_RH = blocks_of_chunk(tile, place)
            if self.sink.bias_V is not None:
                self.sink.bias_V[tile] += grad_CR.sum(dim=0) if sign_C is None else torch.mv(grad_CR.t(), sign_C)
            grad_CR = blocks.narrowed(grad_CR, hidden_CH.dtype)
            if blocks.narrow_grad:
                weight_RH = blocks.weight_VH[tile]
            if partial_CH is not None:
                room_CH = partial_CH if tree is None else torch.zeros_like(partial_CH)
                blocks.hidden_grad(grad_CR, weight_RH, room_CH)
                if tree is not None:
                    tree.add(room_CH)
            if self.sink.sum_VH is not None:
                blocks.weight_grad(grad_CR, factor_CH, self.sink.sum_VH[tile])
        if grad is not None and partial_CH is not None:
            total_CH = tree.total() if tree is not None else None
            total_CH = partial_CH if total_CH is None else total_CH
            grad.put(part, total_CH if sign_C is None else total_CH.mul_(sign_C[:, None]))


def _logits_grad(
    exponential_CR: Tensor, scale_C: Tensor | None, coefficient_C: Tensor, target: tuple[Tensor, Tensor]
) -> Tensor:
    """coefficient x (onehot - p), written over exponentials that `scale_C` turns into p."""
    owned_C, row_C = target
    factor_C = coefficient_C.neg() if scale_C is None else (coefficient_C * scale_C).neg_()
    grad_CR = exponential_CR.mul_(factor_C[:, None])
    return grad_CR.scatter_add_(1, row_C[:, None], (coefficient_C * owned_C)[:, None])


class _GivenLse:
    """Blocks of the logits' gradient where log-sum-exps, coefficients and those of the entropy are known."""

    def __init__(
        self,
        blocks: HeadBlocks,
        target_N: Tensor,
        lse_N: Tensor,
        coefficient_N: Tensor,
        entropy: tuple[Tensor, Tensor] | None = None,  # (coefficient of the entropy, the entropy)
        logit_N: Tensor | None = None,  # filled with the targets' logits
    ) -> None:
        self.blocks, self.target_N, self.lse_N = blocks, target_N, lse_N
        self.coefficient_N, self.entropy, self.logit_N = coefficient_N, entropy, logit_N
        # Where the gradient is rounded anyway, a coefficient's size goes into the exponent and its sign on the rows of
        # dH and hidden states, which is a pass over the block less.
        self.sign_N: Tensor | None = None
        self.shift_N = lse_N
        if blocks.narrow_grad and entropy is None:
            self.sign_N = -coefficient_N.sign()
            self.shift_N = lse_N - (coefficient_N * blocks.cfg.factor).abs().log()

    def block(self, part: slice, operand_CH: Tensor, tile: slice, place: int) -> tuple[Tensor, Tensor]:
        """(gradient of the products of a block, weight operand)."""
        blocks = self.blocks
        weight_RH = blocks.weight(tile)
        logits_CR, slope_CR = blocks.logits(operand_CH, weight_RH, tile)
        target = owned_C, row_C = blocks.shard.localize(self.target_N[part], tile)
        if self.logit_N is not None:
            self.logit_N[part] += logits_CR.gather(1, row_C[:, None]).squeeze(1).where(owned_C, 0.0)
        below_CR = logits_CR.sub_(self.shift_N[part, None])
        coefficient_C = self.coefficient_N[part] * blocks.cfg.factor
        if self.sign_N is not None:
            pull_C = coefficient_C.abs().mul_(owned_C).neg_()
            grad_CR = below_CR.exp_().scatter_add_(1, row_C[:, None], pull_C[:, None])
        elif self.entropy is None:
            grad_CR = _logits_grad(below_CR.exp_(), None, coefficient_C, target)
        else:
            # d entropy / d logit = -p (log p + entropy)
            pull_C, entropy_C = self.entropy[0][part] * blocks.cfg.factor, self.entropy[1][part]
            push_CR = blocks.room.take("scratch", below_CR.shape, blocks.wide).copy_(below_CR)
            push_CR.mul_(pull_C[:, None]).add_((pull_C * entropy_C + coefficient_C)[:, None])
            grad_CR = below_CR.exp_().mul_(push_CR).neg_()
            grad_CR.scatter_add_(1, row_C[:, None], (coefficient_C * owned_C)[:, None])
        return (grad_CR if slope_CR is None else grad_CR.mul_(slope_CR)), weight_RH

    def add_to(self, gradient: _Gradient, rows: Iterator[tuple[slice, Tensor]]) -> None:
        """The gradient of all chunks."""
        for part, hidden_CH in rows:
            operand_CH = self.blocks.operand(hidden_CH)
            sign_C = None if self.sign_N is None else self.sign_N[part]
            gradient.chunk(part, hidden_CH, operand_CH, partial(self.block, part, operand_CH), sign_C=sign_C)


class _OwnLse:
    """The same where log-sum-exps are still to come: a chunk's logits are kept until its statistics are merged."""

    def __init__(self, blocks: HeadBlocks, target_N: Tensor, coefficient_N: Tensor, wanted: Wanted) -> None:
        self.blocks, self.target_N, self.coefficient_N, self.wanted = blocks, target_N, coefficient_N, wanted
        rows = coefficient_N.new_empty(wanted.num_rows, len(target_N))
        self.found = statistics.from_rows(list(rows), wanted)

    def add_to(self, gradient: _Gradient, rows: Iterator[tuple[slice, Tensor]]) -> None:
        """Statistics and gradient of all chunks; one small collective each."""
        for part, hidden_CH in rows:
            operand_CH = self.blocks.operand(hidden_CH)
            largest = self._score(part, operand_CH)
            gradient.chunk(part, hidden_CH, operand_CH, partial(self._kept_block, part, largest))

    def _score(self, part: slice, operand_CH: Tensor) -> list[Tensor]:
        """Merge a chunk's statistics; the largest logit of each token in each tile."""
        blocks = self.blocks
        tiles: list[Statistics] = []
        for place, tile in enumerate(blocks.tiles):
            logits_CR, _ = blocks.logits(operand_CH, blocks.weight(tile), tile, name=("logits", place))
            target = blocks.shard.localize(self.target_N[part], tile)
            tiles.append(_block_statistics(blocks, logits_CR, target, Wanted(largest=True)))
        nothing = statistics.of_nothing(self.found.lse_N[part], self.wanted)
        mine = [one if self.wanted.largest else replace(one, largest_N=None) for one in tiles] or [nothing]
        merged = statistics.over_ranks(statistics.tree(mine, statistics.merge), self.wanted, blocks.shard.group)
        for row_N, row_C in zip(self.found.rows(), merged.rows(), strict=True):
            row_N[part] = row_C
        return [_need(one.largest_N) for one in tiles]

    def _kept_block(self, part: slice, largest: list[Tensor], tile: slice, place: int) -> tuple[Tensor, Tensor]:
        blocks = self.blocks
        kept_CR = blocks.room.take(("logits", place), (part.stop - part.start, tile.stop - tile.start), blocks.wide)
        scale_C = (largest[place] - self.found.lse_N[part]).exp_()
        target = blocks.shard.localize(self.target_N[part], tile)
        grad_CR = _logits_grad(kept_CR, scale_C, self.coefficient_N[part] * blocks.cfg.factor, target)
        return grad_CR, blocks.weight_VH[tile] if blocks.narrow_grad else blocks.weight(tile)


def _need(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


class _Recompute(torch.autograd.Function):
    """One all-gather forward; backward recomputes logits block by block and reduces dH."""

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
    ) -> tuple[Tensor | None, ...]:
        blocks = HeadBlocks(hidden_LH.dtype, weight_VH, bias_V, shard, cfg)
        chunk = blocks.tokens_a_chunk()
        found = _score(blocks, chunks(hidden_LH, tokens, shard.group, chunk), target_N, wanted)
        correct_N = None if found.largest_N is None else found.target_N >= found.largest_N
        ctx.save_for_backward(hidden_LH, target_N, found.lse_N, found.entropy_N)
        ctx.weight, ctx.bias = weight_VH, bias_V  # parameters: their own attributes are wanted
        ctx.shard, ctx.tokens, ctx.cfg, ctx.chunk = shard, tokens, cfg, chunk
        ctx.mark_non_differentiable(*(one for one in (found.lse_N, correct_N) if one is not None))
        ctx.set_materialize_grads(False)
        return found.target_N - found.lse_N, found.lse_N, found.entropy_N, correct_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_LH, target_N, lse_N, entropy_N = ctx.saved_tensors
        grad_N, entropy_grad_N = upstream[0], upstream[2]
        grad_N = torch.zeros_like(lse_N) if grad_N is None else grad_N
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        sink = WeightGrad(ctx.weight, ctx.bias, weight=wants_weight, bias=wants_bias, direct=ctx.cfg.into_main_grad)
        blocks = HeadBlocks(hidden_LH.dtype, ctx.weight, ctx.bias, ctx.shard, ctx.cfg)
        grad = None
        if wants_hidden:
            grad = HiddenGrad(hidden_LH, ctx.tokens, ctx.shard.group, invariant=ctx.cfg.tp_invariant)
        entropy = None if entropy_grad_N is None else (entropy_grad_N, entropy_N)
        given = _GivenLse(blocks, target_N, lse_N, grad_N, entropy)
        given.add_to(_Gradient(blocks, grad, sink), chunks(hidden_LH, ctx.tokens, ctx.shard.group, ctx.chunk))
        return (None if grad is None else grad.result(), *sink.for_autograd(), *[None] * 5)


class _Weighted(torch.autograd.Function):
    """Gradients formed forward; backward scales them and reduces dH."""

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
    ) -> tuple[Tensor | None, ...]:
        wants_hidden, wants_weight, wants_bias = (trains and one for one in ctx.needs_input_grad[:3])
        sink = WeightGrad(weight_VH, bias_V, weight=wants_weight, bias=wants_bias, direct=cfg.into_main_grad)
        grad = HiddenGrad(hidden_LH, tokens, shard.group, invariant=cfg.tp_invariant) if wants_hidden else None
        blocks = HeadBlocks(hidden_LH.dtype, weight_VH, bias_V, shard, cfg)
        gradient = _Gradient(blocks, grad, sink)
        coefficient_N = coefficient_N.to(blocks.wide)
        found = None
        walk = partial(chunks, hidden_LH, tokens, shard.group)
        if lse_N is None and blocks.keeps_logits(len(target_N)):
            own = _OwnLse(blocks, target_N, coefficient_N, Wanted(largest=accuracy))
            own.add_to(gradient, walk(blocks.tokens_a_chunk(keep_logits=True)))
            found = own.found
        elif lse_N is None:
            found = _score(blocks, walk(blocks.tokens_a_chunk()), target_N, Wanted(largest=accuracy))
            given = _GivenLse(blocks, target_N, found.lse_N, coefficient_N)
            given.add_to(gradient, walk(blocks.tokens_a_chunk()))
        else:
            logit_N = torch.zeros_like(lse_N)
            given = _GivenLse(blocks, target_N, lse_N, coefficient_N, logit_N=logit_N)
            given.add_to(gradient, walk(blocks.tokens_a_chunk()))
        correct_N = None
        if found is not None:
            lse_N, logit_N = found.lse_N, found.target_N
            correct_N = None if found.largest_N is None else logit_N >= found.largest_N
        assert lse_N is not None
        logp_N = logit_N - lse_N
        ctx.grad, ctx.sink = grad, sink
        ctx.mark_non_differentiable(*(one for one in (logp_N, lse_N, correct_N) if one is not None))
        ctx.set_materialize_grads(False)
        return (coefficient_N * logp_N).sum(), logp_N, lse_N, correct_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        scale = upstream[0]
        assert scale is not None
        if ctx.sink.direct:
            torch._assert_async(scale == 1, "dW is in main_grad already: the upstream gradient must be 1")
        grad_LH = None if ctx.grad is None else ctx.grad.result(scale)
        return (grad_LH, *ctx.sink.for_autograd(scale), *[None] * 8)
