"""Which rows of the vocabulary a rank owns, and the tiles that every layout computes them in."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

# Tensor-parallel sizes up to this one, powers of two, compute the very same tiles.
MOST_TENSOR_RANKS = 16
# Larger tiles gain nothing in the products; smaller ones leave room for more tokens in the same memory.
MOST_TILE_ROWS = 4096


def tile_rows(padded_vocab_size: int) -> int:
    """Rows of the equal tiles that a padded vocabulary is cut into: 2^d of them, whatever the layout.

    One tile is one matrix product, so its numbers do not depend on which rank holds it.
    """
    rows = -(-padded_vocab_size // MOST_TENSOR_RANKS)
    while rows > MOST_TILE_ROWS and rows % 2 == 0:
        rows //= 2
    return rows


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks that share the vocabulary."""
    return 1 if group is None else dist.get_world_size(group)


@dataclass(frozen=True)
class VocabShard:
    """Vocabulary rows this rank owns; `group=None` means all of them.

    `vocab_size` is the real vocabulary: rows from there on are padding and take no probability. Shards may differ in
    size; `tile` must be the same on all ranks.
    """

    start: int
    size: int
    vocab_size: int
    group: dist.ProcessGroup | None = None
    tile: int | None = None

    @property
    def num_real(self) -> int:
        """How many of this rank's rows stand for real tokens (0 on a rank of padding only)."""
        return max(0, min(self.size, self.vocab_size - self.start))

    @property
    def rows_a_tile(self) -> int:
        """Rows of a tile, the same on all ranks; the last real one may be shorter."""
        return self.tile or tile_rows(self.vocab_size)

    @property
    def tiles(self) -> list[slice]:
        """This rank's real rows, tile by tile."""
        rows = self.rows_a_tile
        return [slice(first, min(first + rows, self.num_real)) for first in range(0, self.num_real, rows)]

    def localize(self, target_T: Tensor, tile: slice | None = None) -> tuple[Tensor, Tensor]:
        """(owned_T, row_T): whether the id lies on this rank, or in this tile of it, and its row there (else 0)."""
        first, last = (0, self.size) if tile is None else (tile.start, tile.stop)
        row_T = target_T - (self.start + first)
        owned_T = (row_T >= 0) & (row_T < last - first)
        return owned_T, row_T.where(owned_T, 0)
