"""Scores responses with teacher models: each response's mean log-prob by token, as the teacher tokenizes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
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
    needed: Set[int] | None = None,
    say: Callable[[str], None],
    progress: Progress,
) -> GroupDataset:
    """Return the data set with the scores of the configured teachers; scores in the records are kept.

    load: builds an engine with a teacher's weights; only one is in memory at a time. needed: the groups of the steps
    that are left; others may stay without scores. None: all.
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
        if not parts:
            continue
        engine, done = load(texts.model), 0
        for part in parts:
            scored = score(engine, [texts.sequences[at] for at in part], coupled=False, packing=packing_of(cfg))
            for at, result in zip(part, scored, strict=True):
                scores[texts.group_indices[at]][texts.name] = result.total / texts.sequences[at].num_scored
            done += len(part)
            progress(f"teacher {texts.name}", done, total)
    return dataset.with_teacher_scores(scores)


def _parts(cfg: JobConfig, texts: TeacherTexts, needed: Set[int] | None) -> list[range]:
    """Return the places in `texts` that are scored together; whole parts, so that a resumed run packs them alike."""
    total, size = len(texts.sequences), 4 * (cfg.data.groups_per_step or 64)
    parts = [range(first, min(first + size, total)) for first in range(0, total, size)]
    if needed is None:
        return parts
    return [part for part in parts if any(texts.group_indices[at] in needed for at in part)]
