"""Scores responses with teacher models: each response's mean log-prob by token, as the teacher tokenizes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megalign.config.job import JobConfig
from megalign.convert.hf.model import HFModel
from megalign.data.dataset import GroupDataset
from megalign.data.group import TokenSequence
from megalign.engines.build import packing_of
from megalign.engines.protocol import Scorer
from megalign.engines.scoring import score

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
    say: Callable[[str], None],
    progress: Progress,
) -> GroupDataset:
    """Return the data set with the scores of the configured teachers; scores in the records are kept.

    load: builds an engine with a teacher's weights; only one is in memory at a time.
    """
    if not cfg.teachers:
        return dataset
    names = {teacher.name for teacher in cfg.teachers}
    scores = [
        {name: value for name, value in group.teacher_scores.items() if name in names} for group in dataset.groups
    ]
    for texts in teachers:
        say(f"scoring {len(texts.sequences)} responses with teacher {texts.name}")
        means = _mean_logps(cfg, texts, load(texts.model), progress)
        for index, mean in zip(texts.group_indices, means, strict=True):
            scores[index][texts.name] = mean
    return dataset.with_teacher_scores(scores)


def _mean_logps(cfg: JobConfig, texts: TeacherTexts, engine: Scorer, progress: Progress) -> list[float]:
    """Compute each response's log-prob divided by its number of scored tokens."""
    means: list[float] = []
    total, size = len(texts.sequences), 4 * (cfg.data.groups_per_step or 64)
    for first in range(0, total, size):
        part = texts.sequences[first : first + size]
        scored = score(engine, part, coupled=False, packing=packing_of(cfg))
        means += [result.total / sequence.num_scored for sequence, result in zip(part, scored, strict=True)]
        progress(f"teacher {texts.name}", len(means), total)
    return means
