"""Token log-probs from a dense matrix of logits: the slow version that the head by blocks is held against.

Axes: N tokens, H hidden, V vocabulary (the real one, without padding rows).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

HIDDEN = 7
PADDING = 50.0  # what padding rows hold: logits that would swallow all probability if they took part


@dataclass
class Problem:
    """Inputs of one call; the weight has the real vocabulary's rows only."""

    hidden_NH: Tensor
    weight_VH: Tensor
    target_N: Tensor
    upstream_N: Tensor  # of the log-probs
    entropy_upstream_N: Tensor
    bias_V: Tensor | None = None

    def rounded(self, dtype: torch.dtype) -> Problem:
        """Round the inputs to numbers that `dtype` can hold."""
        bias_V = None if self.bias_V is None else self.bias_V.to(dtype).double()
        hidden_NH, weight_VH = (one.to(dtype).double() for one in (self.hidden_NH, self.weight_VH))
        return replace(self, hidden_NH=hidden_NH, weight_VH=weight_VH, bias_V=bias_V)


@dataclass
class Answer:
    """Values, and gradients of sum(upstream x log-prob), plus that of the entropies where it was asked for."""

    logp_N: Tensor
    lse_N: Tensor
    entropy_N: Tensor | None
    correct_N: Tensor | None
    grad_NH: Tensor
    grad_VH: Tensor
    grad_V: Tensor | None


def make_problem(
    num_tokens: int,
    vocab: int,
    *,
    scale: float = 1.0,
    seed: int = 0,
    borders: tuple[int, ...] = (),
    bias: bool = False,
    hidden: int = HIDDEN,
) -> Problem:
    """Random float64 inputs; the first targets are `borders`, the upstream gradients all differ in size and sign."""
    random = torch.Generator().manual_seed(seed)
    target_N = torch.randint(vocab, (num_tokens,), generator=random)
    kept = torch.tensor(borders[:num_tokens], dtype=torch.int64)
    target_N[: len(kept)] = kept

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random)

    hidden_NH = numbers(num_tokens, hidden) * scale
    weight_VH = numbers(vocab, hidden)
    upstream_N = numbers(num_tokens) * torch.arange(1, num_tokens + 1)
    entropy_upstream_N = numbers(num_tokens) * 3
    bias_V = numbers(vocab) if bias else None
    return Problem(hidden_NH, weight_VH, target_N, upstream_N, entropy_upstream_N, bias_V)


def dense_logits(
    product_NV: Tensor, bias_V: Tensor | None, *, temperature: float, scale: float, softcap: float | None
) -> Tensor:
    """Logits of hidden . weight: bias, scale, cap and temperature applied."""
    logits_NV = product_NV if bias_V is None else product_NV + bias_V
    logits_NV = logits_NV * scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return logits_NV / temperature


def objective(problem: Problem, logits_NV: Tensor, *, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(what gradients are taken of, log-probs of the targets, entropies)."""
    every_NV = logits_NV.log_softmax(dim=1)
    logp_N = every_NV.gather(1, problem.target_N[:, None]).squeeze(1)
    entropy_N = -(every_NV.exp() * every_NV).sum(dim=1)
    value = (logp_N * problem.upstream_N.to(logp_N.dtype)).sum()
    if entropy:
        value = value + (entropy_N * problem.entropy_upstream_N.to(logp_N.dtype)).sum()
    return value, logp_N, entropy_N


@torch.enable_grad()
def solve(
    problem: Problem,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Answer:
    """Values and gradients from all logits at once, computed in `dtype`."""
    hidden_NH = problem.hidden_NH.detach().to(dtype, copy=True).requires_grad_()
    weight_VH = problem.weight_VH.detach().to(dtype, copy=True).requires_grad_()
    bias_V = None if problem.bias_V is None else problem.bias_V.detach().to(dtype, copy=True).requires_grad_()
    logits_NV = dense_logits(hidden_NH @ weight_VH.t(), bias_V, temperature=temperature, scale=scale, softcap=softcap)
    value, logp_N, entropy_N = objective(problem, logits_NV, entropy=entropy)
    value.backward()
    assert hidden_NH.grad is not None and weight_VH.grad is not None
    logits_NV = logits_NV.detach()
    return Answer(
        logp_N.detach(),
        logits_NV.logsumexp(dim=1),
        entropy_N.detach(),
        logits_NV.gather(1, problem.target_N[:, None]).squeeze(1) >= logits_NV.max(dim=1).values,
        hidden_NH.grad,
        weight_VH.grad,
        None if bias_V is None else bias_V.grad,
    )


def padded(rows_V: Tensor, *, start: int, size: int) -> Tensor:
    """The rows a rank holds of a weight or a bias: its part of the real ones, then padding that counts for nothing."""
    real_V = rows_V[start : start + size]
    padding_V = rows_V.new_full((size - len(real_V), *rows_V.shape[1:]), PADDING)
    return torch.cat([real_V, padding_V])
