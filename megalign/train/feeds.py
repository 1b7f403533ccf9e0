"""Supplies steps with global batches of records from files, whose fixed scores are computed before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch

from megalign.config.job import JobConfig, total_steps
from megalign.data.dataset import GroupDataset
from megalign.data.group import TokenSequence
from megalign.engines.build import packing_of
from megalign.engines.protocol import Scorer, Want
from megalign.engines.scoring import Scored, score
from megalign.engines.step import StepBatch
from megalign.scores.kept import KeptScores
from megalign.scores.needed import Needed, needed_scores
from megalign.scores.store import ScoreStore, fill
from megalign.train.reporter import Reporter


class Feed(Protocol):
    """Supplies one global batch a step, the same on every rank."""

    def batch(self, step: int) -> StepBatch:
        """Return the batch of a step (from 0). Steps come in order; the first may be any that `restore` allows."""

    def position(self, step: int) -> dict[str, float]:
        """Return how far the data are used after `step` steps: `epoch`, and in rounds `round`."""

    def stats(self, step: int) -> Mapping[str, float]:
        """Return the metrics of a step (from 0) that do not come from its loss."""

    def origins(self, step: int, members: Sequence[int]) -> list[str]:
        """Return where the records of these sequences of a step (from 0) were read, as `path:line`."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold so that a resumed run takes the same next step, without communication.

        JSON must be able to express it, besides bytes; a tuple comes back as a list.
        """

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state` of a checkpoint."""


def behaviour(sequence: TokenSequence) -> Scored | None:
    """Return the record's own score of the response, under the policy that sampled it; None if it has none."""
    logp = sequence.response.scored_behaviour_logp
    if logp is None:
        return None
    return Scored(sum(logp), torch.tensor(logp, dtype=torch.float32))


def _every(sequence: TokenSequence) -> bool:
    return True


def _lacks_behaviour(sequence: TokenSequence) -> bool:
    return behaviour(sequence) is None


def old_scores(sequences: Sequence[TokenSequence], store: ScoreStore) -> list[Scored]:
    """Return behaviour log-probs where the records have them, else those of the policy that the store scored."""
    return [behaviour(sequence) or store.get([sequence])[0] for sequence in sequences]


Wanted = Callable[[TokenSequence], bool]
Keep = Callable[[str, bool], KeptScores]  # (what is scored, whether by token) -> where its scores are kept
REFERENCE, INITIAL = "scoring reference", "scoring initial policy"


@dataclass(frozen=True, slots=True)
class Batches:
    """Makes the batches of sequences to score, one at a time; may be gone through more than once."""

    count: int
    batch: Callable[[int], list[TokenSequence]]

    def __iter__(self) -> Iterator[list[TokenSequence]]:
        return map(self.batch, range(self.count))


@dataclass
class DatasetFeed:
    """Supplies steps over a data set; held-out data are one batch, for evaluation."""

    cfg: JobConfig
    dataset: GroupDataset
    held_out: bool = False
    reference: ScoreStore | None = None
    old: ScoreStore | None = None
    first: StepBatch | None = None  # step 0 with its scores under the initial weights, by token
    after: int = 0  # steps that the run has taken before this start: what they alone need is not scored again

    @property
    def num_steps(self) -> int:
        """Return how many steps the run takes."""
        return total_steps(self.cfg, self.dataset.epoch_size)

    @property
    def _groups_per_step(self) -> int:
        assert self.cfg.data.groups_per_step is not None
        return self.cfg.data.groups_per_step

    @property
    def _by_token(self) -> bool:
        return self.cfg.loss.traits().level == "token"

    def sequences(self, step: int) -> tuple[list[TokenSequence], int]:
        """Return the sequences of a step (from 0) and their number of groups."""
        items = self.dataset.step_items(step, groups_per_step=self._groups_per_step, shuffle=self.cfg.data.shuffle)
        return self.dataset.sequences(items)

    def groups_after(self, step: int) -> set[int]:
        """Return the indices of the groups that steps from `step` (from 0) on train on."""
        groups, shuffle = self._groups_per_step, self.cfg.data.shuffle
        steps = range(step, self.num_steps)
        items = (self.dataset.step_items(each, groups_per_step=groups, shuffle=shuffle) for each in steps)
        return {index for step_items in items for _, index in step_items}

    def batch(self, step: int) -> StepBatch:
        """Return the step's global batch with the scores that its loss needs."""
        if step == 0 and self.first is not None:
            return self.first
        return self._assemble(*self.sequences(step))

    def whole(self) -> StepBatch:
        """Return every group once, as one batch; for evaluation."""
        return self._assemble(*self._whole())

    def _whole(self) -> tuple[list[TokenSequence], int]:
        return self.dataset.sequences([(0, index) for index in range(len(self.dataset))])

    def _assemble(self, sequences: list[TokenSequence], num_groups: int) -> StepBatch:
        reference = None if self.reference is None else self.reference.get(sequences)
        old = None if self.old is None else old_scores(sequences, self.old)
        return StepBatch(sequences, num_groups, reference, old)

    def position(self, step: int) -> dict[str, float]:
        """Return the epochs that `step` steps take."""
        return {"epoch": step * self._groups_per_step / self.dataset.epoch_size}

    def stats(self, step: int) -> Mapping[str, float]:
        """Return no metrics: a step's are those of its loss."""
        return {}

    def origins(self, step: int, members: Sequence[int]) -> list[str]:
        """Return where the records of these sequences of a step (from 0) were read, as `path:line`."""
        dataset = self.dataset
        items = dataset.step_items(step, groups_per_step=self._groups_per_step, shuffle=self.cfg.data.shuffle)
        sequences, _ = dataset.sequences(items)
        return [dataset.origins[items[sequences[member].group][1]] for member in members]

    def state(self) -> dict[str, Any]:
        """Return nothing: a step's batch follows from its number."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Do nothing, as `state` returns nothing."""

    def score_reference(self, load: Callable[[], Scorer], report: Reporter, keep: Keep) -> None:
        """Score every sequence that is needed with a reference's own engine, which `load` builds if any is."""
        self.reference = ScoreStore(by_token=self._by_token)
        kept = self._kept(keep, REFERENCE, self.reference)
        needed = self._needed(REFERENCE, report, _every)
        if any(map(self.reference.missing, self._batches(_every, needed))):
            self._fill(load(), self.reference, REFERENCE, report, self._batches(_every, needed), kept)

    def score_policy(self, engine: Scorer, report: Reporter, keep: Keep) -> None:
        """Score under the initial policy: every sequence if it is the reference, else those without old log-probs."""
        traits = self.cfg.loss.traits()
        is_reference = traits.reference and self.cfg.reference.source in ("initial", "round_start")
        if not is_reference and not traits.old:
            return
        store = ScoreStore(by_token=self._by_token)
        self.old = store if traits.old else None
        self.reference = store if is_reference else self.reference
        wanted: Wanted = _every if is_reference else _lacks_behaviour
        kept = self._kept(keep, INITIAL, store)
        needed = self._needed(INITIAL, report, wanted)
        with_first = not self.held_out and (needed is None or needed.with_first)
        current = self._score_first(engine, store, wanted, kept) if with_first else None
        batches = self._batches(wanted, needed)
        self._fill(engine, store, INITIAL, report, batches, kept)
        if current is not None and not self.after:
            self.first = replace(self._assemble(*self.sequences(0)), current=current)

    def _score_first(self, engine: Scorer, store: ScoreStore, wanted: Wanted, kept: KeptScores) -> list[Scored] | None:
        """Score all of step 0's sequences, packed as the step will pack them; None where none is wanted.

        The step runs under the same initial weights, so it can use these scores too.
        """
        traits, (sequences, _) = self.cfg.loss.traits(), self.sequences(0)
        missing = bool(store.missing(sequences))
        if not any(map(wanted, sequences)) or (self.after and not missing):
            return None
        current = score(
            engine,
            sequences,
            coupled=traits.coupled,
            packing=packing_of(self.cfg),
            want=Want(traits.entropy, traits.accuracy, by_token=True),
        )
        store.add(sequences, current)
        if missing:
            kept.add(sequences, current)
        return current

    def _kept(self, keep: Keep, name: str, store: ScoreStore) -> KeptScores:
        """Fill a store with the scores that an earlier start has kept; return where new ones are."""
        kept = keep(f"{name} (held-out data)" if self.held_out else name, store.by_token)
        kept.load(store)
        return kept

    def _wanted_of(self, step: int, wanted: Wanted) -> list[TokenSequence]:
        """Return the wanted sequences of a step; of held-out data all, which are one batch."""
        return list(filter(wanted, (self._whole() if self.held_out else self.sequences(step))[0]))

    def _needed(self, name: str, report: Reporter, wanted: Wanted) -> Needed | None:
        """Return what is scored for the steps that are left; None if that is everything."""
        if self.held_out or not self.after:
            return None
        needed = needed_scores(partial(self._wanted_of, wanted=wanted), self.num_steps, self.after)
        report.say(f"{name}: {needed.num_sequences} of {needed.num_all} sequences, for the steps after {self.after}")
        return needed

    def _batches(self, wanted: Wanted, needed: Needed | None) -> Batches:
        """Return the batches to score; of `needed` None: the wanted sequences step by step, held-out ones at once."""
        if needed is not None:
            return Batches(len(needed.batches), lambda at: needed.batches[at][1])
        return Batches(1 if self.held_out else self.num_steps, partial(self._wanted_of, wanted=wanted))

    def _fill(
        self, engine: Scorer, store: ScoreStore, name: str, report: Reporter, batches: Batches, kept: KeptScores
    ) -> None:
        with kept:
            fill(
                store,
                engine,
                batches,
                coupled=self.cfg.loss.traits().coupled,
                packing=packing_of(self.cfg),
                progress=lambda done: report.phase(name, done, batches.count),
                keep=kept.add,
            )
