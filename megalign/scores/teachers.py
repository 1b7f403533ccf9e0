"""Scores responses with teacher models: each response's mean log-prob by token, as the teacher tokenizes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from megalign.config.job import JobConfig
from megalign.convert.hf.model import HFModel
from megalign.data.dataset import GroupDataset
from megalign.data.group import TokenSequence
from megalign.engines.build import packing_of
from megalign.engines.protocol import Scorer
from megalign.scores.kept import KeptScores
from megalign.scores.store import ScoreStore, fill

Progress = Callable[[str, int, int], None]  # called with (name of the work, done, total)


@dataclass(frozen=True, slots=True)
class TeacherTexts:
    """Holds the records that lack a teacher's score, and their responses as the teacher tokenizes them."""

    name: str
    model: HFModel
    group_indices: list[int]
    sequences: list[TokenSequence]


def with_teacher_scores(
    cfg: JobConfig,
    dataset: GroupDataset,
    teachers: Sequence[TeacherTexts],
    load: Callable[[HFModel], Scorer],
    *,
    needed: Set[int] | None = None,
    say: Callable[[str], None],
    progress: Progress,
    keep: Callable[[str], KeptScores],
) -> GroupDataset:
    """Return the data set with the scores of the configured teachers; scores in the records are kept.

    load: builds an engine with a teacher's weights; only one is in memory at a time. needed: the groups of the steps
    that are left; others may stay without scores. None: all. keep: returns where a teacher's scores are kept.
    """
    if not cfg.teachers:
        return dataset
    names = {teacher.name for teacher in cfg.teachers}
    scores = [
        {name: value for name, value in group.teacher_scores.items() if name in names} for group in dataset.groups
    ]
    for texts in teachers:
        parts = _parts(cfg, texts, needed)
        total, count = sum(map(len, parts)), len(texts.sequences)
        say(f"scoring {total}{'' if total == count else f' of {count}'} responses with teacher {texts.name}")
        store, kept = ScoreStore(by_token=False), keep(f"teacher {texts.name}")
        kept.load(store)
        batches = [[texts.sequences[at] for at in part] for part in parts]
        if any(map(store.missing, batches)):
            _score(cfg, load(texts.model), store, kept, batches, partial(progress, f"teacher {texts.name}"))
        for part, sequences in zip(parts, batches, strict=True):
            for at, result in zip(part, store.get(sequences), strict=True):
                scores[texts.group_indices[at]][texts.name] = result.total / texts.sequences[at].num_scored
    return dataset.with_teacher_scores(scores)


def _score(
    cfg: JobConfig,
    engine: Scorer,
    store: ScoreStore,
    kept: KeptScores,
    batches: Sequence[Sequence[TokenSequence]],
    progress: Callable[[int, int], None],
) -> None:
    ends = [0, *accumulate(map(len, batches))]
    with kept:
        fill(
            store,
            engine,
            batches,
            coupled=False,
            packing=packing_of(cfg),
            progress=lambda done: progress(ends[done], ends[-1]),
            keep=kept.add,
            whole=True,
        )


def _parts(cfg: JobConfig, texts: TeacherTexts, needed: Set[int] | None) -> list[range]:
    """Return the places in `texts` that are scored together; whole parts, so that a resumed run packs them alike."""
    total, size = len(texts.sequences), 4 * (cfg.data.groups_per_step or 64)
    parts = [range(first, min(first + size, total)) for first in range(0, total, size)]
    if needed is None:
        return parts
    return [part for part in parts if any(texts.group_indices[at] in needed for at in part)]
