"""Forms the gradient of a head's logits block by block and adds dH and dW of each block.

Axes: N scored tokens of a call, H hidden, V this rank's rows of the vocabulary, R rows of a tile, C tokens of a chunk.
The gradient of a weighted sum of log-probs is coefficient x (onehot - p); p needs each token's log-sum-exp, which is
either known (`GivenLse`) or comes from the chunk's own statistics (`OwnLse`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megalign.ops import statistics
from megalign.ops.head_blocks import HeadBlocks
from megalign.ops.hidden_rows import HiddenGrad
from megalign.ops.statistics import Statistics, TreeSum, Wanted
from megalign.ops.weight_grad import WeightGrad


class BlockGrad(NamedTuple):
    """Holds the gradient of a block's product, and what its own products need."""

    grad_CR: Tensor
    weight_RH: Tensor  # operand of dH's product
    bias_R: Tensor | None = None  # the sum over tokens, where it is formed with the gradient


Blocks = Callable[[slice, int], BlockGrad]  # (tile, its index)


class Gradient:
    """Accumulates dH and dW of one call from the logits' gradient of each block."""

    def __init__(self, blocks: HeadBlocks, grad: HiddenGrad | None, sink: WeightGrad) -> None:
        self.blocks, self.grad, self.sink = blocks, grad, sink

    def chunk(
        self,
        part: slice,
        hidden_CH: Tensor,
        operand_CH: Tensor,
        blocks_of_chunk: Blocks,
        *,
        sign_C: Tensor | None = None,
    ) -> None:
        """Add a chunk's dH and dW; sign_C: signs still to be applied to the rows of the logits' gradient."""
        blocks, grad = self.blocks, self.grad
        partial_CH = None if grad is None else grad.zeros(part)
        tree = TreeSum() if grad is not None and grad.invariant else None
        factor_CH = hidden_CH if blocks.low_precision_grad else operand_CH
        if sign_C is not None:
            factor_CH = factor_CH * sign_C[:, None].to(factor_CH.dtype)
        for index, tile in enumerate(blocks.tiles):
            grad_CR, weight_RH, bias_R = blocks_of_chunk(tile, index)
            if self.sink.bias_V is not None:
                if bias_R is None:
                    bias_R = grad_CR.sum(dim=0) if sign_C is None else torch.mv(grad_CR.t(), sign_C)
                self.sink.bias_V[tile] += bias_R
            grad_CR = blocks.grad_operand(grad_CR, hidden_CH.dtype)
            if partial_CH is not None:
                tile_CH = partial_CH if tree is None else torch.zeros_like(partial_CH)
                blocks.hidden_grad(grad_CR, weight_RH, tile_CH)
                if tree is not None:
                    tree.add(tile_CH)
            if self.sink.sum_VH is not None:
                blocks.weight_grad(grad_CR, factor_CH, self.sink.sum_VH[tile])
        if grad is not None and partial_CH is not None:
            total_CH = tree.total() if tree is not None else None
            total_CH = partial_CH if total_CH is None else total_CH
            grad.put(part, total_CH if sign_C is None else total_CH.mul_(sign_C[:, None]))


def _logits_grad(
    exponential_CR: Tensor, scale_C: Tensor | None, coefficient_C: Tensor, target: tuple[Tensor, Tensor]
) -> Tensor:
    """Overwrite the exponentials by coefficient x (onehot - p) and return it; p = exponential x scale_C."""
    owned_C, row_C = target
    factor_C = coefficient_C.neg() if scale_C is None else (coefficient_C * scale_C).neg_()
    grad_CR = exponential_CR.mul_(factor_C[:, None])
    return grad_CR.scatter_add_(1, row_C[:, None], (coefficient_C * owned_C)[:, None])


class GivenLse:
    """Computes blocks of the logits' gradient from known log-sum-exps; may include the entropy's gradient."""

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
        # For low-precision gradients the coefficient's magnitude goes into the exponent and its sign into the rows of
        # dH and hidden states, which saves a pass over the block.
        self.sign_N: Tensor | None = None
        self.shift_N = lse_N
        if blocks.low_precision_grad and entropy is None and blocks.compiled is None:
            self.sign_N = -coefficient_N.sign()
            self.shift_N = lse_N - (coefficient_N * blocks.cfg.factor).abs().log()

    def block(self, part: slice, operand_CH: Tensor, tile: slice, index: int) -> BlockGrad:
        """Return the gradient of a block's product."""
        blocks = self.blocks
        weight_RH = blocks.weight(tile)
        product_CR = blocks.product(operand_CH, weight_RH)
        target = blocks.shard.localize(self.target_N[part], tile)
        if blocks.compiled is None:
            return BlockGrad(self._plain(part, product_CR, target, tile), blocks.grad_weight(tile, weight_RH))
        entropy = None
        if self.entropy is not None:
            entropy = self.entropy[0][part] * blocks.cfg.factor, self.entropy[1][part]
        of_tokens = (self.lse_N[part], self.coefficient_N[part] * blocks.cfg.factor, entropy)
        grad_CR, logit_C, bias_R = blocks.compiled_grad(product_CR, tile, target, *of_tokens)
        if self.logit_N is not None:
            self.logit_N[part] += logit_C
        return BlockGrad(grad_CR, blocks.grad_weight(tile, weight_RH), bias_R)

    def _plain(self, part: slice, product_CR: Tensor, target: tuple[Tensor, Tensor], tile: slice) -> Tensor:
        """Overwrite a block's product by its gradient and return it."""
        blocks, (owned_C, row_C) = self.blocks, target
        logits_CR, slope_CR = blocks.logits(product_CR, tile)
        if self.logit_N is not None:
            self.logit_N[part] += logits_CR.gather(1, row_C[:, None]).squeeze(1).where(owned_C, 0.0)
        below_CR = logits_CR.sub_(self.shift_N[part, None])
        coefficient_C = self.coefficient_N[part] * blocks.cfg.factor
        if self.sign_N is not None:
            target_C = coefficient_C.abs().mul_(owned_C).neg_()
            grad_CR = below_CR.exp_().scatter_add_(1, row_C[:, None], target_C[:, None])
        elif self.entropy is None:
            grad_CR = _logits_grad(below_CR.exp_(), None, coefficient_C, target)
        else:
            # d entropy / d logit = -p (log p + entropy)
            entropy_coefficient_C, entropy_C = self.entropy[0][part] * blocks.cfg.factor, self.entropy[1][part]
            factor_CR = blocks.workspace.take("scratch", below_CR.shape, blocks.accumulation_dtype).copy_(below_CR)
            factor_CR.mul_(entropy_coefficient_C[:, None])
            factor_CR.add_((entropy_coefficient_C * entropy_C + coefficient_C)[:, None])
            grad_CR = below_CR.exp_().mul_(factor_CR).neg_()
            grad_CR.scatter_add_(1, row_C[:, None], (coefficient_C * owned_C)[:, None])
        return grad_CR if slope_CR is None else grad_CR.mul_(slope_CR)

    def add_to(self, gradient: Gradient, rows: Iterator[tuple[slice, Tensor]]) -> None:
        """Add the gradient of all chunks."""
        for part, hidden_CH in rows:
            operand_CH = self.blocks.operand(hidden_CH)
            sign_C = None if self.sign_N is None else self.sign_N[part]
            gradient.chunk(part, hidden_CH, operand_CH, partial(self.block, part, operand_CH), sign_C=sign_C)


class OwnLse:
    """Computes log-sum-exps and gradient together: a chunk's logits are kept until its statistics are merged."""

    def __init__(self, blocks: HeadBlocks, target_N: Tensor, coefficient_N: Tensor, wanted: Wanted) -> None:
        self.blocks, self.target_N, self.coefficient_N, self.wanted = blocks, target_N, coefficient_N, wanted
        rows = coefficient_N.new_empty(wanted.num_rows, len(target_N))
        self.result = statistics.from_rows(list(rows), wanted)

    def add_to(self, gradient: Gradient, rows: Iterator[tuple[slice, Tensor]]) -> None:
        """Compute statistics and add the gradient of all chunks; one small collective each."""
        for part, hidden_CH in rows:
            operand_CH = self.blocks.operand(hidden_CH)
            largest = self._score(part, operand_CH)
            gradient.chunk(part, hidden_CH, operand_CH, partial(self._kept_block, part, largest))

    def _score(self, part: slice, operand_CH: Tensor) -> list[Tensor]:
        """Compute and merge a chunk's statistics; return the largest logit of each token in each tile."""
        blocks = self.blocks
        results: list[Statistics] = []
        for index, tile in enumerate(blocks.tiles):
            wanted, name = Wanted(largest=True), ("logits", index)
            results.append(blocks.statistics(operand_CH, self.target_N[part], tile, wanted, name=name))
        nothing = statistics.of_nothing(self.result.lse_N[part], self.wanted)
        mine = [tile if self.wanted.largest else replace(tile, largest_N=None) for tile in results] or [nothing]
        merged = statistics.over_ranks(statistics.tree(mine, statistics.merge), self.wanted, blocks.shard.group)
        for row_N, row_C in zip(self.result.rows(), merged.rows(), strict=True):
            row_N[part] = row_C
        return [_need(tile.largest_N) for tile in results]

    def _kept_block(self, part: slice, largest: list[Tensor], tile: slice, index: int) -> BlockGrad:
        blocks = self.blocks
        kept_CR = blocks.workspace.take(
            ("logits", index), (part.stop - part.start, tile.stop - tile.start), blocks.accumulation_dtype
        )
        lse_C, coefficient_C = self.result.lse_N[part], self.coefficient_N[part] * blocks.cfg.factor
        target = blocks.shard.localize(self.target_N[part], tile)
        if blocks.compiled is not None:
            grad_CR, _, bias_R = blocks.compiled_grad(kept_CR, tile, target, lse_C, coefficient_C, None)
            return BlockGrad(grad_CR, blocks.grad_weight(tile), bias_R)
        scale_C = (largest[index] - lse_C).exp_()
        return BlockGrad(_logits_grad(kept_CR, scale_C, coefficient_C, target), blocks.grad_weight(tile))


def _need(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
