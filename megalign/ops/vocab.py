"""Says which rows of the vocabulary a rank owns, and in which tiles every layout computes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megalign.ops.block_sizes import BLOCK_SIZES

# Tensor-parallel sizes that are powers of two up to this one compute identical tiles.
MOST_TENSOR_RANKS = 16


def tile_rows(padded_vocab_size: int, device: str = "cpu") -> int:
    """Return the rows of a tile: a padded vocabulary is split into 2^d equal tiles, whatever the layout.

    One tile is one matrix product, so its numbers do not depend on which rank holds it. device: cpu or cuda.
    """
    rows, most = -(-padded_vocab_size // MOST_TENSOR_RANKS), BLOCK_SIZES[device].most_tile_rows
    while most is not None and rows > most and rows % 2 == 0:
        rows //= 2
    return rows


def group_size(group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks that share the vocabulary."""
    return 1 if group is None else dist.get_world_size(group)


@dataclass(frozen=True)
class VocabShard:
    """Describes the vocabulary rows that this rank owns; `group=None` means all of them.

    `vocab_size` is the real vocabulary: rows from there on are padding without probability. Shards may differ in
    size; `tile` must be the same on all ranks.
    """

    start: int
    size: int
    vocab_size: int
    group: dist.ProcessGroup | None = None
    tile: int | None = None

    @property
    def num_real(self) -> int:
        """Return how many of this rank's rows stand for real tokens (0 on a rank of padding only)."""
        return max(0, min(self.size, self.vocab_size - self.start))

    @property
    def rows_a_tile(self) -> int:
        """Return the rows of a tile, the same on all ranks; the last real one may be shorter."""
        return self.tile or tile_rows(self.vocab_size)

    @property
    def tiles(self) -> list[slice]:
        """Return this rank's real rows, tile by tile."""
        rows = self.rows_a_tile
        return [slice(first, min(first + rows, self.num_real)) for first in range(0, self.num_real, rows)]

    def localize(self, target_T: Tensor, tile: slice | None = None) -> tuple[Tensor, Tensor]:
        """Return (owned_T, row_T): whether the id lies on this rank (or in its `tile`), and its row there, else 0."""
        first, last = (0, self.size) if tile is None else (tile.start, tile.stop)
        row_T = target_T - (self.start + first)
        owned_T = (row_T >= 0) & (row_T < last - first)
        return owned_T, row_T.where(owned_T, 0)
