"""Which rows of the vocabulary a rank owns."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Vocabulary rows this rank owns; `group=None` means all of them.

    `vocab_size` is the real vocabulary: rows from there on are padding and take no probability.
    """

    start: int
    size: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    @property
    def num_real(self) -> int:
        """How many of this rank's rows stand for real tokens (0 on a rank of padding only)."""
        return max(0, min(self.size, self.vocab_size - self.start))

    def localize(self, target_T: Tensor) -> tuple[Tensor, Tensor]:
        """(owned_T, row_T): whether this rank owns the id, and its row here (0 where another rank owns it)."""
        owned_T = (target_T >= self.start) & (target_T < self.start + self.size)
        return owned_T, (target_T - self.start).where(owned_T, 0)
