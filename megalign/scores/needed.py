"""Lists what a resumed run still has to score: the sequences of the steps that are left, each batch as at the start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megalign.data.group import TokenSequence
from megalign.scores.store import Key, key_of


@dataclass(frozen=True, slots=True)
class Needed:
    """Holds the batches to score with their steps (from 0), and how many sequences the whole run scores."""

    batches: list[tuple[int, list[TokenSequence]]] = field(default_factory=list)
    num_all: int = 0

    @property
    def num_sequences(self) -> int:
        """Return how many sequences are scored."""
        return sum(len(sequences) for _, sequences in self.batches)

    @property
    def with_first(self) -> bool:
        """Tell whether the run's first batch is among them."""
        return bool(self.batches) and self.batches[0][0] == 0


def needed_scores(batch_of: Callable[[int], Sequence[TokenSequence]], num_steps: int, after: int) -> Needed:
    """List what steps from `after` on need; `batch_of` gives the sequences of a step (from 0).

    A sequence is scored in the batch in which it comes first, together with all that come first there, as an
    uninterrupted run does: packed with others, its score could differ in the last bits.
    """
    needed = {key_of(sequence) for step in range(after, num_steps) for sequence in batch_of(step)}
    seen: set[Key] = set()
    batches = []
    for step in range(num_steps):
        new: dict[Key, TokenSequence] = {}
        for sequence in batch_of(step):
            if (key := key_of(sequence)) not in seen:
                new.setdefault(key, sequence)
        seen |= new.keys()
        if not needed.isdisjoint(new):
            batches.append((step, list(new.values())))
    return Needed(batches, len(seen))
