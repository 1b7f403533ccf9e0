"""Fetches the scored tokens' hidden states from their ranks and returns their gradient, a chunk at a time.

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

from megalign.ops.head_blocks import accumulation_dtype
from megalign.ops.statistics import tree
from megalign.ops.vocab import group_size


@dataclass(frozen=True, slots=True)
class TokenShard:
    """Holds the number of scored tokens on each rank of the vocabulary's group, in order (sequence parallelism)."""

    counts: tuple[int, ...]
    rank: int

    @property
    def num_tokens(self) -> int:
        """Return the number of scored tokens of all ranks."""
        return sum(self.counts)

    def owners(self, part: slice) -> list[tuple[int, slice, slice]]:
        """Return (rank, its own rows, rows of the chunk) for each rank that holds tokens of the chunk."""
        result, start = [], 0
        for rank, count in enumerate(self.counts):
            first, last = max(part.start, start), min(part.stop, start + count)
            if first < last:
                result.append((rank, slice(first - start, last - start), slice(first - part.start, last - part.start)))
            start += count
        return result


def chunks(
    hidden_LH: Tensor, tokens: TokenShard | None, group: dist.ProcessGroup | None, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield each chunk's (slice of tokens, hidden states); only two chunks are in memory at a time."""
    num_tokens = len(hidden_LH) if tokens is None else tokens.num_tokens
    parts = [slice(first, min(first + chunk, num_tokens)) for first in range(0, num_tokens, chunk)]
    if tokens is None or group is None or group_size(group) == 1:
        yield from ((part, hidden_LH[part]) for part in parts)
        return
    coming = _fetch(hidden_LH, tokens, group, parts[0]) if parts else None
    for index, part in enumerate(parts):
        assert coming is not None
        hidden_CH, works = coming
        coming = _fetch(hidden_LH, tokens, group, parts[index + 1]) if index + 1 < len(parts) else None
        for work in works:
            work.wait()
        yield part, hidden_CH


def _fetch(
    hidden_LH: Tensor, tokens: TokenShard, group: dist.ProcessGroup, part: slice
) -> tuple[Tensor, list[dist.Work]]:
    """Return a chunk's buffer and the broadcasts that are filling it."""
    hidden_CH = hidden_LH.new_empty(part.stop - part.start, hidden_LH.shape[1])
    works = []
    for rank, own, rows in tokens.owners(part):
        if rank == tokens.rank:
            hidden_CH[rows] = hidden_LH[own]
        source = dist.get_global_rank(group, rank)
        works.append(dist.broadcast(hidden_CH[rows], src=source, group=group, async_op=True))
    return hidden_CH, [work for work in works if work is not None]


class HiddenGrad:
    """Accumulates dH over chunks and over the ranks of the vocabulary's group.

    invariant: gather the ranks' parts and continue the tree over tiles, so that no bit depends on the number of ranks.
    """

    def __init__(
        self, hidden_LH: Tensor, tokens: TokenShard | None, group: dist.ProcessGroup | None, *, invariant: bool
    ) -> None:
        self.tokens, self.group = tokens, group
        self.size = group_size(group)
        self.invariant = invariant  # on one rank too: more ranks reproduce its order of additions
        self.dtype = hidden_LH.dtype
        self.accumulation_dtype = accumulation_dtype(hidden_LH.dtype)
        # Each chunk is summed in fp32; the whole is kept in fp32 only if it still has to be all-reduced.
        self.grad_LH = torch.zeros_like(hidden_LH, dtype=self.accumulation_dtype if self._whole else self.dtype)
        self._sent: list[tuple[int, slice, Tensor, dist.Work | None]] = []

    @property
    def _whole(self) -> bool:
        """Tell whether chunks are rows of `grad_LH` itself, reduced together at the end."""
        return self.tokens is None and not self.invariant and (self.size > 1 or self.dtype == self.accumulation_dtype)

    def zeros(self, part: slice) -> Tensor:
        """Return zeros for this rank's part of a chunk's dH."""
        if self._whole:
            return self.grad_LH[part]
        return self.grad_LH.new_zeros(part.stop - part.start, self.grad_LH.shape[1], dtype=self.accumulation_dtype)

    def put(self, part: slice, partial_CH: Tensor) -> None:
        """Take this rank's finished part of a chunk's dH and start its reduction over ranks."""
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
        """Wait for the chunk that is being reduced and store this rank's rows of it."""
        for rank, own, reduced, work in self._sent:
            if work is not None:
                work.wait()
            if self.tokens is not None and rank == self.tokens.rank:
                self.grad_LH[own] = reduced
        self._sent.clear()

    def result(self, scale: Tensor | None = None) -> Tensor:
        """Return this rank's rows of dH in the dtype of the hidden states; may be called once."""
        self._collect()
        if self._whole and self.size > 1 and self.grad_LH.numel():
            dist.all_reduce(self.grad_LH, group=self.group)
        # Let go of it here: autograd copies a tensor that is referenced elsewhere.
        grad_LH, self.grad_LH = self.grad_LH, self.grad_LH.new_empty(0)
        return (grad_LH if scale is None else grad_LH.mul_(scale)).to(self.dtype)
