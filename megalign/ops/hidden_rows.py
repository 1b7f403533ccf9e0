"""Where the scored tokens' hidden states lie and where their gradient goes, a chunk at a time.

Axes: N scored tokens of a call in order, L of them on this rank, C tokens of a chunk, H hidden. Without sequence
parallelism every rank of the vocabulary's group holds all of them (L = N), and dH is all-reduced once. With it, ranks
hold runs of tokens: a chunk's rows come from their owners by broadcast, one chunk ahead of the products, and its dH
goes back to them by reduction while the next chunk is computed. Chunks are the same tokens either way, and never more
than two of them are held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.ops.head_blocks import wide
from megalign.ops.statistics import tree
from megalign.ops.vocab import group_size


@dataclass(frozen=True, slots=True)
class TokenShard:
    """How many of the scored tokens each rank of the vocabulary's group holds, in rank order (sequence parallelism)."""

    counts: tuple[int, ...]
    rank: int

    @property
    def num_tokens(self) -> int:
        """Scored tokens of all ranks."""
        return sum(self.counts)

    def owners(self, part: slice) -> list[tuple[int, slice, slice]]:
        """(rank, its own rows, rows of the chunk) of each rank that holds tokens of the chunk."""
        found, start = [], 0
        for rank, count in enumerate(self.counts):
            first, last = max(part.start, start), min(part.stop, start + count)
            if first < last:
                found.append((rank, slice(first - start, last - start), slice(first - part.start, last - part.start)))
            start += count
        return found


def chunks(
    hidden_LH: Tensor, tokens: TokenShard | None, group: dist.ProcessGroup | None, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    """(which tokens, their hidden states) of each chunk in order; valid until the next but one is asked for."""
    num_tokens = len(hidden_LH) if tokens is None else tokens.num_tokens
    parts = [slice(first, min(first + chunk, num_tokens)) for first in range(0, num_tokens, chunk)]
    if tokens is None or group is None or group_size(group) == 1:
        yield from ((part, hidden_LH[part]) for part in parts)
        return
    coming = _fetch(hidden_LH, tokens, group, parts[0]) if parts else None
    for place, part in enumerate(parts):
        assert coming is not None
        hidden_CH, works = coming
        coming = _fetch(hidden_LH, tokens, group, parts[place + 1]) if place + 1 < len(parts) else None
        for work in works:
            work.wait()
        yield part, hidden_CH


def _fetch(
    hidden_LH: Tensor, tokens: TokenShard, group: dist.ProcessGroup, part: slice
) -> tuple[Tensor, list[dist.Work]]:
    """A chunk's room, and the broadcasts that are filling it."""
    hidden_CH = hidden_LH.new_empty(part.stop - part.start, hidden_LH.shape[1])
    works = []
    for rank, own, rows in tokens.owners(part):
        if rank == tokens.rank:
            hidden_CH[rows] = hidden_LH[own]
        source = dist.get_global_rank(group, rank)
        works.append(dist.broadcast(hidden_CH[rows], src=source, group=group, async_op=True))
    return hidden_CH, [work for work in works if work is not None]


class HiddenGrad:
    """dH, added up over the ranks of the vocabulary's group.

    invariant: ranks' parts are gathered and added as the tree over tiles is, so that no bit depends on their number.
    """

    def __init__(
        self, hidden_LH: Tensor, tokens: TokenShard | None, group: dist.ProcessGroup | None, *, invariant: bool
    ) -> None:
        self.tokens, self.group = tokens, group
        self.size = group_size(group)
        self.invariant = invariant  # at one rank too, whose order of adding is what the others keep to
        self.dtype = hidden_LH.dtype
        self.wide = wide(hidden_LH.dtype)
        # Sums run in fp32; only where ranks' parts of all tokens are still to be added are they kept in it.
        self.grad_LH = torch.zeros_like(hidden_LH, dtype=self.wide if self._whole else self.dtype)
        self._sent: list[tuple[int, slice, Tensor, dist.Work | None]] = []

    @property
    def _whole(self) -> bool:
        """Whether chunks are rows of `grad_LH` itself, reduced together at the end."""
        return self.tokens is None and not self.invariant and (self.size > 1 or self.dtype == self.wide)

    def zeros(self, part: slice) -> Tensor:
        """Room for this rank's part of a chunk's dH."""
        if self._whole:
            return self.grad_LH[part]
        return self.grad_LH.new_zeros(part.stop - part.start, self.grad_LH.shape[1], dtype=self.wide)

    def put(self, part: slice, partial_CH: Tensor) -> None:
        """A chunk's part is complete: send it on its way."""
        if self._whole:
            return
        if self.invariant:
            self._keep(part, self._tree(partial_CH))
        elif self.tokens is not None and self.group is not None and self.size > 1:
            self._collect()
            for rank, own, rows in self.tokens.owners(part):
                owner = dist.get_global_rank(self.group, rank)
                work = dist.reduce(partial_CH[rows], dst=owner, group=self.group, async_op=True)
                self._sent.append((rank, own, partial_CH[rows], work))
        else:
            self._keep(part, partial_CH)

    def _tree(self, partial_CH: Tensor) -> Tensor:
        if self.size == 1:
            return partial_CH
        gathered = partial_CH.new_empty((self.size, *partial_CH.shape))
        dist.all_gather_into_tensor(gathered.view(-1), partial_CH.reshape(-1), group=self.group)
        return tree(list(gathered), torch.add)

    def _keep(self, part: slice, whole_CH: Tensor) -> None:
        if self.tokens is None:
            self.grad_LH[part] = whole_CH
            return
        for rank, own, rows in self.tokens.owners(part):
            if rank == self.tokens.rank:
                self.grad_LH[own] = whole_CH[rows]

    def _collect(self) -> None:
        """Wait for the chunk under way; two at most are held."""
        for rank, own, reduced, work in self._sent:
            if work is not None:
                work.wait()
            if self.tokens is not None and rank == self.tokens.rank:
                self.grad_LH[own] = reduced
        self._sent.clear()

    def result(self, scale: Tensor | None = None) -> Tensor:
        """This rank's rows of dH, complete, in the dtype of the hidden states; once."""
        self._collect()
        if self._whole and self.size > 1 and self.grad_LH.numel():
            dist.all_reduce(self.grad_LH, group=self.group)
        grad_LH, self.grad_LH = self.grad_LH, self.grad_LH.new_empty(0)  # autograd copies what others hold
        return (grad_LH if scale is None else grad_LH.mul_(scale)).to(self.dtype)
