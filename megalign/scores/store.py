"""Keeps the log-probs of sequences under fixed weights (reference, old policy), keyed by token ids.

A store holds the scores under a single set of weights.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence

import torch

from megalign.data.group import TokenSequence
from megalign.data.packing import Packing
from megalign.engines.protocol import Scorer, Want
from megalign.engines.scoring import Scored, score

Key = bytes


def key_of(sequence: TokenSequence) -> Key:
    """Return a hash of all that a sequence's score depends on besides the weights: its ids, and which are scored."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(len(sequence.prompt_ids).to_bytes(8, "little"))
    digest.update(array("q", sequence.prompt_ids + sequence.response.ids).tobytes())
    if sequence.response.scored is not None:
        digest.update(bytes(sequence.response.scored))
    return digest.digest()


def to_plain(scored: Scored) -> tuple[float, list[float] | None]:
    """Return a score's sum and its log-probs by token, if kept, as plain values for a checkpoint."""
    return scored.total, None if scored.logp_N is None else scored.logp_N.tolist()


def from_plain(total: float, logp: Sequence[float] | None) -> Scored:
    """Rebuild a score from the values of `to_plain`."""
    return Scored(total, None if logp is None else torch.tensor(logp, dtype=torch.float32))


class ScoreStore:
    """Holds the scores under one set of weights: log-probs by token if `by_token`, else sums alone."""

    def __init__(self, *, by_token: bool) -> None:
        self.by_token = by_token
        self._entries: dict[Key, Scored] = {}

    def add(self, sequences: Sequence[TokenSequence], scored: Sequence[Scored]) -> None:
        """Keep these scores without log-sum-exps, which only a step under the same weights can use."""
        for sequence, entry in zip(sequences, scored, strict=True):
            self._entries[key_of(sequence)] = Scored(entry.total, entry.logp_N if self.by_token else None)

    def put(self, key: Key, entry: Scored) -> None:
        """Keep a score by its sequence's key."""
        self._entries[key] = entry

    def missing(self, sequences: Iterable[TokenSequence]) -> list[TokenSequence]:
        """Return the sequences that have no score, each once."""
        missing: dict[Key, TokenSequence] = {}
        for sequence in sequences:
            key = key_of(sequence)
            if key not in self._entries:
                missing.setdefault(key, sequence)
        return list(missing.values())

    def plain(self) -> list[tuple[Key, float, list[float] | None]]:
        """Return the entries as plain values, for a checkpoint."""
        return [(key, *to_plain(entry)) for key, entry in self._entries.items()]

    @classmethod
    def from_plain(cls, entries: Iterable[tuple[Key, float, list[float] | None]], *, by_token: bool) -> ScoreStore:
        """Rebuild a store from the result of `plain`."""
        store = cls(by_token=by_token)
        for key, total, logp in entries:
            store._entries[key] = from_plain(total, logp)
        return store

    def get(self, sequences: Iterable[TokenSequence]) -> list[Scored]:
        """Return the scores in the sequences' order; KeyError for one that was never scored."""
        return [self._entries[key_of(sequence)] for sequence in sequences]


def fill(
    store: ScoreStore,
    engine: Scorer,
    batches: Iterable[Sequence[TokenSequence]],
    *,
    coupled: bool,
    packing: Packing,
    progress: Callable[[int], None] = lambda done: None,
    keep: Callable[[Sequence[TokenSequence], Sequence[Scored]], None] = lambda sequences, scored: None,
    whole: bool = False,
) -> None:
    """Score what the store lacks, batch by batch.

    progress: called with the number of batches done. keep: called with what each batch adds. whole: score all of a
    batch that lacks any, as with others in a pack a score has other last bits.
    """
    want = Want(by_token=store.by_token)
    for done, sequences in enumerate(batches, start=1):
        missing = store.missing(sequences)
        if missing:
            missing = list(sequences) if whole else missing
            scored = score(engine, missing, coupled=coupled, packing=packing, want=want)
            store.add(missing, scored)
            keep(missing, scored)
        progress(done)
