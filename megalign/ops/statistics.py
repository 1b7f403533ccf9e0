"""Computes softmax statistics of each token over tiles of the vocabulary, and merges them over the whole of it.

Axes: C tokens of a chunk, N tokens of a call, R rows of a tile. A token's statistics over some rows: log-sum-exp, the
target's logit (0 where it lies elsewhere), and if requested the entropy of the softmax over these rows and the
largest logit. Two neighbouring sets merge into one, as a binary tree over tiles that the ranks continue: a rank holds a
subtree, so that the numbers do not depend on how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import softplus

from megalign.ops.vocab import group_size

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Says which statistics are computed besides log-sum-exp and the target's logit."""

    entropy: bool = False
    largest: bool = False

    @property
    def num_rows(self) -> int:
        """Return the number of statistics."""
        return 2 + self.entropy + self.largest


@dataclass(frozen=True, slots=True)
class Statistics:
    """Holds the statistics of each token over some rows of the vocabulary."""

    lse_N: Tensor
    target_N: Tensor
    entropy_N: Tensor | None = None
    largest_N: Tensor | None = None

    def rows(self) -> list[Tensor]:
        """Return the tensors that were computed, in the order of the fields."""
        every = (self.lse_N, self.target_N, self.entropy_N, self.largest_N)
        return [row for row in every if row is not None]


def from_rows(rows: Sequence[Tensor], wanted: Wanted) -> Statistics:
    """Rebuild statistics from the result of `Statistics.rows`."""
    rest = list(rows[2:])
    entropy_N = rest.pop(0) if wanted.entropy else None
    return Statistics(rows[0], rows[1], entropy_N, rest.pop(0) if wanted.largest else None)


def of_block(
    logits_CR: Tensor, owned_C: Tensor, row_C: Tensor, wanted: Wanted, scratch: Callable[[], Tensor]
) -> Statistics:
    """Return a tile's statistics; its logits become exp(logit - largest). row_C: the target's row, 0 if not owned_C."""
    logit_C = logits_CR.gather(1, row_C[:, None]).squeeze(1).where(owned_C, 0.0)
    largest_C = logits_CR.amax(dim=1)
    logits_CR.sub_(largest_C[:, None])
    below_CR = scratch().copy_(logits_CR) if wanted.entropy else None
    total_C = logits_CR.exp_().sum(dim=1)
    entropy_C = None
    log_total_C = total_C.log()
    if below_CR is not None:
        entropy_C = log_total_C - below_CR.mul_(logits_CR).sum(dim=1) / total_C
    return Statistics(log_total_C + largest_C, logit_C, entropy_C, largest_C if wanted.largest else None)


def of_nothing(like_N: Tensor, wanted: Wanted) -> Statistics:
    """Return the identity of `merge` (a rank without real vocabulary rows)."""
    none_N, zero_N = torch.full_like(like_N, -torch.inf), torch.zeros_like(like_N)
    return Statistics(
        none_N, zero_N, zero_N.clone() if wanted.entropy else None, none_N.clone() if wanted.largest else None
    )


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Return the statistics over the rows of both.

    Entropy by the chain rule: H = sum_i w_i (H_i - log w_i), w_i the share of probability; no large terms cancel.
    """
    lse_N = torch.logaddexp(a.lse_N, b.lse_N)
    entropy_N = largest_N = None
    if a.entropy_N is not None and b.entropy_N is not None:
        entropy_N = _share(a.lse_N, a.entropy_N, b.lse_N) + _share(b.lse_N, b.entropy_N, a.lse_N)
    if a.largest_N is not None and b.largest_N is not None:
        largest_N = torch.maximum(a.largest_N, b.largest_N)
    return Statistics(lse_N, a.target_N + b.target_N, entropy_N, largest_N)


def _share(lse_N: Tensor, entropy_N: Tensor, other_N: Tensor) -> Tensor:
    # From the difference of both log-sum-exps: the merged one's rounding would swallow a small weight.
    log_weight_N = -softplus(other_N - lse_N)
    part_N = log_weight_N.exp() * (entropy_N - log_weight_N)
    return part_N.where(lse_N > -torch.inf, 0.0)


def tree(parts: Sequence[Part], merge_two: Callable[[Part, Part], Part]) -> Part:
    """Merge neighbours pairwise, level by level; an odd one out waits for the next level."""
    level = list(parts)
    while len(level) > 1:
        pairs = [merge_two(a, b) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[2 * len(pairs) :]
    return level[0]


def over_ranks(mine: Statistics, wanted: Wanted, group: dist.ProcessGroup | None) -> Statistics:
    """Merge the ranks' statistics into the whole vocabulary's: one all-gather of [rows, N], then the tree of ranks."""
    size = group_size(group)
    if size == 1 or not len(mine.lse_N):
        return mine
    packed = torch.stack(mine.rows())
    gathered = packed.new_empty((size, *packed.shape))
    dist.all_gather_into_tensor(gathered.view(-1), packed.view(-1), group=group)
    return tree([from_rows(list(rank), wanted) for rank in gathered], merge)


class TreeSum:
    """Sums tensors in the order of `tree`, holding only one partial sum a level."""

    def __init__(self) -> None:
        self._held: list[tuple[int, Tensor]] = []

    def add(self, value: Tensor) -> None:
        """Add the next tensor; it may be overwritten."""
        level = 0
        while self._held and self._held[-1][0] == level:
            value = self._held.pop()[1].add_(value)
            level += 1
        self._held.append((level, value))

    def total(self) -> Tensor | None:
        """Return the sum, None if nothing was added; to be called once."""
        total: Tensor | None = None
        while self._held:
            held = self._held.pop()[1]
            total = held if total is None else held.add_(total)
        return total
