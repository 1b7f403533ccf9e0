"""The head's forms called alike, with the inputs of a `Problem` and the outputs of an `Answer`.

Axes: N tokens of a call, L of them on this rank, V this rank's rows of the vocabulary, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalign.ops.head_blocks import HeadConfig
from megalign.ops.hidden_rows import TokenShard
from megalign.ops.linear_logp import TokenLogp, linear_logp, weighted_logp
from megalign.ops.vocab import VocabShard
from tests.support.slow_logp import Answer, Problem, padded

FORMS = ("recompute", "weighted", "given lse")
PLAIN = HeadConfig()


@dataclass
class Call:
    """A form after its forward: `value.backward()` is what is left to do."""

    value: Tensor
    logp: TokenLogp
    hidden_LH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None

    def answer(self) -> Answer:
        """Run backward; gradients are of this rank's hidden states and rows, padding included."""
        self.value.backward()
        assert self.hidden_LH.grad is not None and self.weight_VH.grad is not None
        return Answer(
            self.logp.logp_N.detach(),
            self.logp.lse_N,
            None if self.logp.entropy_N is None else self.logp.entropy_N.detach(),
            self.logp.correct_N,
            self.hidden_LH.grad,
            self.weight_VH.grad,
            None if self.bias_V is None else self.bias_V.grad,
        )


def whole(problem: Problem, *, padding: int = 3, tile: int | None = None) -> VocabShard:
    """All of the vocabulary on one rank, and some padding."""
    vocab = len(problem.weight_VH)
    return VocabShard(0, vocab + padding, vocab, tile=tile)


def own_rows(hidden_NH: Tensor, tokens: TokenShard | None) -> Tensor:
    """The hidden states that a rank brings."""
    if tokens is None:
        return hidden_NH
    start = sum(tokens.counts[: tokens.rank])
    return hidden_NH[start : start + tokens.counts[tokens.rank]]


def call(
    problem: Problem,
    form: str,
    shard: VocabShard,
    *,
    cfg: HeadConfig = PLAIN,
    dtype: torch.dtype = torch.float64,
    lse_N: Tensor | None = None,
    tokens: TokenShard | None = None,
    entropy: bool = False,
    accuracy: bool = False,
) -> Call:
    """Run a form's forward; `lse_N` matters to the form "given lse" alone, the entropy to "recompute"."""
    hidden_LH = own_rows(problem.hidden_NH, tokens).detach().to(dtype, copy=True).requires_grad_()
    weight_VH = padded(problem.weight_VH, start=shard.start, size=shard.size).to(dtype).requires_grad_()
    bias_V = None
    if problem.bias_V is not None:
        bias_V = padded(problem.bias_V, start=shard.start, size=shard.size).to(dtype).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    upstream_N = problem.upstream_N.to(wide)
    if form == "recompute":
        logp = linear_logp(
            hidden_LH,
            weight_VH,
            problem.target_N,
            shard,
            bias_V=bias_V,
            tokens=tokens,
            cfg=cfg,
            entropy=entropy,
            accuracy=accuracy,
        )
        value = (logp.logp_N * upstream_N).sum()
        if logp.entropy_N is not None:
            value = value + (logp.entropy_N * problem.entropy_upstream_N.to(wide)).sum()
    else:
        given_N = lse_N if form == "given lse" else None
        value, logp = weighted_logp(
            hidden_LH,
            weight_VH,
            problem.target_N,
            upstream_N,
            shard,
            lse_N=given_N,
            bias_V=bias_V,
            tokens=tokens,
            cfg=cfg,
            accuracy=accuracy and given_N is None,
        )
    return Call(value, logp, hidden_LH, weight_VH, bias_V)


def own_part(dense: Answer, shard: VocabShard, tokens: TokenShard | None, *, form: str, target_N: Tensor) -> Answer:
    """Take a rank's part of the dense answer: its rows, no gradient for padding, -lse for others' targets."""

    def rows(grad_V: Tensor) -> Tensor:
        mine_V = padded(grad_V, start=shard.start, size=shard.size)
        mine_V[shard.num_real :] = 0
        return mine_V

    logp_N = dense.logp_N
    if form == "given lse":
        owned_N = (target_N >= shard.start) & (target_N < shard.start + shard.size)
        logp_N = logp_N.where(owned_N, -dense.lse_N)
    return Answer(
        logp_N,
        dense.lse_N,
        dense.entropy_N,
        dense.correct_N,
        own_rows(dense.grad_NH, tokens),
        rows(dense.grad_VH),
        None if dense.grad_V is None else rows(dense.grad_V),
    )


def assert_same(answer: Answer, expected: Answer, *, tolerance: float, note: str = "") -> None:
    """Every number that the answer has is the expected one; padding, which `own_part` gives 0, gets exactly that."""
    for name, mine in vars(answer).items():
        theirs = getattr(expected, name)
        if mine is None:
            assert name in ("entropy_N", "correct_N", "grad_V"), f"{note}: no {name}"
        elif name == "correct_N":
            assert torch.equal(mine, theirs), f"{note}: {name}"
        else:
            assert mine.shape == theirs.shape, f"{note}: {name}"
            far = (mine.double() - theirs).abs() > tolerance * (1 + theirs.abs())
            assert mine.isfinite().all() and not far.any(), f"{note}: {name} is {mine}, not {theirs}"
        if name in ("grad_VH", "grad_V") and mine is not None:
            unused_V = ~theirs.reshape(len(theirs), -1).any(dim=1)
            assert not mine[unused_V].any(), f"{note}: a padding row got a gradient"


def error(mine: Tensor, exact: Tensor) -> float:
    """Norm of the difference, in float64."""
    return float((mine.double() - exact.double()).norm())
