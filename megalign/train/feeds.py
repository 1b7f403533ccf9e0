"""Where the steps' global batches come from when they are read from files: records, reference and teacher scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from megalign.config import JobConfig
from megalign.data.dataset import GroupDataset
from megalign.data.group import Sequence as FlatSequence
from megalign.engines.engine import Engine
from megalign.engines.groups import Groups
from megalign.engines.scoring import Scored, score
from megalign.engines.step import StepBatch
from megalign.runtime.distributed import World
from megalign.train.check import Records
from megalign.train.report import Reporter
from megalign.train.scores import ScoreStore, fill
from megalign.train.session import build_engine, cutting_of


class Feed(Protocol):
    """One global batch a step, the same on every rank."""

    def batch(self, step: int) -> StepBatch:
        """The batch of a step (from 0). Steps come in order; the first may be any that `restore` allows."""

    def stats(self, step: int) -> Mapping[str, float]:
        """Metrics of the step that the loss does not know."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for the next step to be the same."""

    def restore(self, state: dict[str, Any]) -> None: ...


def behaviour(sequence: FlatSequence) -> Scored | None:
    """The score that the record itself brings, of the policy that sampled the response."""
    logp = sequence.response.scored_behaviour_logp
    if logp is None:
        return None
    import torch

    return Scored(sum(logp), torch.tensor(logp, dtype=torch.float32))


def old_scores(sequences: Sequence[FlatSequence], store: ScoreStore) -> list[Scored]:
    """Behaviour log-probs where the records have them, else those of the policy that the store scored."""
    return [behaviour(sequence) or store.get([sequence])[0] for sequence in sequences]


@dataclass
class DatasetFeed:
    """Steps over a data set, with every score that does not change scored before the first step."""

    cfg: JobConfig
    dataset: GroupDataset
    reference: ScoreStore | None = None
    old: ScoreStore | None = None
    first: StepBatch | None = None  # step 0 with its scores under the initial weights, by token

    def sequences(self, step: int) -> tuple[list[FlatSequence], int]:
        groups_per_step = self.cfg.data.groups_per_step
        assert groups_per_step is not None
        items = self.dataset.step_items(step, groups_per_step=groups_per_step, shuffle=self.cfg.data.shuffle)
        return self.dataset.sequences(items)

    def batch(self, step: int) -> StepBatch:
        if step == 0 and self.first is not None:
            return self.first
        return self._assemble(*self.sequences(step))

    def _assemble(self, sequences: list[FlatSequence], num_groups: int) -> StepBatch:
        reference = None if self.reference is None else self.reference.get(sequences)
        old = None if self.old is None else old_scores(sequences, self.old)
        return StepBatch(sequences, num_groups, reference, old)

    def whole(self) -> StepBatch:
        """Every group once, as one batch; for evaluation."""
        return self._assemble(*self.dataset.sequences([(0, index) for index in range(len(self.dataset))]))

    def stats(self, step: int) -> Mapping[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass

    def score_reference(self, engine: Engine, num_steps: int, report: Reporter, *, held_out: bool) -> None:
        """Score every sequence of the run with a reference's own engine."""
        self.reference = ScoreStore(by_token=self.cfg.loss.traits().level == "token")
        self._fill(engine, self.reference, num_steps, report, "scoring reference", held_out=held_out)

    def score_policy(self, engine: Engine, num_steps: int, report: Reporter, *, held_out: bool) -> None:
        """Score what the loss wants of the initial policy: as reference every sequence, as old what brings no score."""
        traits = self.cfg.loss.traits()
        is_reference = traits.reference and self.cfg.reference.source in ("initial", "round_start")
        if not is_reference and not traits.old:
            return
        store = ScoreStore(by_token=traits.level == "token")
        self.old = store if traits.old else None
        self.reference = store if is_reference else self.reference
        wanted: Callable[[FlatSequence], bool] = lambda one: is_reference or behaviour(one) is None  # noqa: E731
        sequences, num_groups = self.sequences(0)
        current = None
        if not held_out and any(map(wanted, sequences)):
            # Step 0's scores are known to its own step too: the weights have not changed by then.
            current = score(
                engine,
                sequences,
                coupled=traits.coupled,
                cutting=cutting_of(self.cfg),
                by_token=True,
                entropy=traits.entropy,
                accuracy=traits.accuracy,
            )
            store.add(sequences, current)
        self._fill(engine, store, num_steps, report, "scoring initial policy", held_out=held_out, wanted=wanted)
        if current is not None:
            self.first = replace(self._assemble(sequences, num_groups), current=current)

    def _fill(
        self,
        engine: Engine,
        store: ScoreStore,
        num_steps: int,
        report: Reporter,
        name: str,
        *,
        held_out: bool,
        wanted: Callable[[FlatSequence], bool] = lambda sequence: True,
    ) -> None:
        coupled = self.cfg.loss.traits().coupled

        def batches() -> Iterator[list[FlatSequence]]:
            if held_out:
                yield list(filter(wanted, self.whole_sequences()))
                return
            for step in range(num_steps):
                yield list(filter(wanted, self.sequences(step)[0]))

        total = 1 if held_out else num_steps
        show: Callable[[int], None] = lambda done: report.phase(name, done, total)  # noqa: E731
        fill(store, engine, batches(), coupled=coupled, cutting=cutting_of(self.cfg), progress=show)

    def whole_sequences(self) -> list[FlatSequence]:
        return self.dataset.sequences([(0, index) for index in range(len(self.dataset))])[0]


def with_teachers(
    cfg: JobConfig, records: Records, groups: Groups, world: World, report: Reporter, *, held_out: bool
) -> GroupDataset:
    """The data set with each teacher's mean log-prob a response token, where records lack it, and filtered by it.

    Held-out records are not filtered.
    """
    dataset = records.dataset
    scores = [dict(group.teacher_scores) for group in dataset.groups]
    for texts in records.teachers:
        engine = build_engine(cfg, texts.model, groups, world, trainable=False)
        engine.load_weights(texts.hf_dir)
        report.say(f"scoring {len(texts.places)} responses with teacher {texts.name}")
        size = 4 * (cfg.data.groups_per_step or 64)
        for first in range(0, len(texts.places), size):
            part = texts.sequences[first : first + size]
            found = score(engine, part, coupled=False, cutting=cutting_of(cfg), by_token=False)
            for place, sequence, one in zip(texts.places[first : first + size], part, found, strict=True):
                scores[place][texts.name] = one.total / sequence.num_scored
            report.phase(f"teacher {texts.name}", min(first + size, len(texts.places)), len(texts.places))
        del engine
    if cfg.teachers:
        named = {teacher.name for teacher in cfg.teachers}
        dataset = dataset.with_teacher_scores([{k: v for k, v in one.items() if k in named} for one in scores])
    if cfg.data.filter is not None and not held_out:
        dataset = dataset.keep_highest(cfg.data.filter.teacher_score_keep)
    return dataset
