"""Scores of sequences under fixed weights, kept by what was scored: reference, old policy, teachers.

The seam for a cache on disk: entries are keyed by the ids alone, and one store holds the scores of one set of weights.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence

import torch

from megalign.data.group import Sequence as FlatSequence
from megalign.engines.engine import Scorer
from megalign.engines.scoring import Cutting, Scored, score

Key = bytes


def key_of(sequence: FlatSequence) -> Key:
    """What a sequence's score depends on besides the weights: its ids, and which of them are scored."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(len(sequence.prompt_ids).to_bytes(8, "little"))
    digest.update(array("q", sequence.prompt_ids + sequence.response.ids).tobytes())
    if sequence.response.scored is not None:
        digest.update(bytes(sequence.response.scored))
    return digest.digest()


class ScoreStore:
    """Scores under one set of weights; by token where `by_token`, else sums."""

    def __init__(self, *, by_token: bool) -> None:
        self.by_token = by_token
        self._entries: dict[Key, Scored] = {}

    def add(self, sequences: Sequence[FlatSequence], scored: Sequence[Scored]) -> None:
        """Keep these; log-probs by token only where the store is for them, lse never (it is a step's own)."""
        for sequence, one in zip(sequences, scored, strict=True):
            self._entries[key_of(sequence)] = Scored(one.total, one.logp_N if self.by_token else None)

    def missing(self, sequences: Iterable[FlatSequence]) -> list[FlatSequence]:
        """Those without a score, each once."""
        found: dict[Key, FlatSequence] = {}
        for sequence in sequences:
            key = key_of(sequence)
            if key not in self._entries:
                found.setdefault(key, sequence)
        return list(found.values())

    def plain(self) -> list[tuple[Key, float, list[float] | None]]:
        """The entries as plain values, for a checkpoint."""
        return [
            (key, one.total, None if one.logp_N is None else one.logp_N.tolist()) for key, one in self._entries.items()
        ]

    @classmethod
    def from_plain(cls, entries: Iterable[tuple[Key, float, list[float] | None]], *, by_token: bool) -> ScoreStore:
        """What `plain` gave, as a store again."""
        store = cls(by_token=by_token)
        for key, total, logp in entries:
            store._entries[key] = Scored(total, None if logp is None else torch.tensor(logp, dtype=torch.float32))
        return store

    def get(self, sequences: Iterable[FlatSequence]) -> list[Scored]:
        """Scores in the sequences' order; KeyError for one that was never scored."""
        return [self._entries[key_of(sequence)] for sequence in sequences]


def fill(
    store: ScoreStore,
    engine: Scorer,
    batches: Iterable[Sequence[FlatSequence]],
    *,
    coupled: bool,
    cutting: Cutting,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Score what the store lacks, batch by batch."""
    for done, sequences in enumerate(batches, start=1):
        missing = store.missing(sequences)
        if missing:
            store.add(missing, score(engine, missing, coupled=coupled, cutting=cutting, by_token=store.by_token))
        progress(done)
