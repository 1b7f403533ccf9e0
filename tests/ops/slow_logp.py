"""Token log-probs from a dense float64 matrix of logits: the slow version that the chunked one is held against."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megalign.ops.vocab import VocabShard

HIDDEN = 7
PADDING = 50.0  # what padding rows hold: logits that would swallow all probability if they took part


@dataclass
class Problem:
    """Inputs of one call; the weight has the real vocabulary's rows only."""

    hidden_TH: Tensor
    weight_VH: Tensor
    target_T: Tensor
    upstream_T: Tensor


@dataclass
class Answer:
    logp_T: Tensor
    lse_T: Tensor
    grad_TH: Tensor
    grad_VH: Tensor


def make_problem(
    num_tokens: int, vocab: int, *, scale: float = 1.0, seed: int = 0, borders: tuple[int, ...] = ()
) -> Problem:
    """Random float64 inputs; the first targets are `borders`, the upstream gradients all differ in size and sign."""
    random = torch.Generator().manual_seed(seed)
    target_T = torch.randint(vocab, (num_tokens,), generator=random)
    kept = torch.tensor(borders[:num_tokens], dtype=torch.int64)
    target_T[: len(kept)] = kept
    return Problem(
        torch.randn(num_tokens, HIDDEN, dtype=torch.float64, generator=random) * scale,
        torch.randn(vocab, HIDDEN, dtype=torch.float64, generator=random),
        target_T,
        torch.randn(num_tokens, dtype=torch.float64, generator=random) * torch.arange(1, num_tokens + 1),
    )


def solve(problem: Problem, *, temperature: float = 1.0, dtype: torch.dtype = torch.float64) -> Answer:
    """Values and the gradient of sum(upstream x log-prob), from all logits at once, computed in `dtype`."""
    hidden_TH = problem.hidden_TH.detach().to(dtype).requires_grad_()
    weight_VH = problem.weight_VH.detach().to(dtype).requires_grad_()
    logits_TV = hidden_TH @ weight_VH.t() / temperature
    logp_T = logits_TV.log_softmax(dim=1).gather(1, problem.target_T[:, None]).squeeze(1)
    (logp_T * problem.upstream_T.to(dtype)).sum().backward()
    assert hidden_TH.grad is not None and weight_VH.grad is not None
    return Answer(logp_T.detach(), logits_TV.detach().logsumexp(dim=1), hidden_TH.grad, weight_VH.grad)


def padded_rows(weight_VH: Tensor, shard: VocabShard) -> Tensor:
    """The rows a rank holds: its part of the real ones, then padding that must count for nothing."""
    rows = torch.full((shard.size, weight_VH.shape[1]), PADDING, dtype=weight_VH.dtype)
    real = weight_VH[shard.start : shard.start + shard.num_real]
    rows[: len(real)] = real
    return rows
