"""Declares what the checks of a job return: its models, records and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megalign.convert.hf.model import HFModel
from megalign.data.dataset import GroupDataset
from megalign.rollout.prompts import Prompt
from megalign.scores.teachers import TeacherTexts


@dataclass(frozen=True, slots=True)
class Records:
    """Holds a data set that passed the checks, and the responses that the teachers have to score."""

    dataset: GroupDataset
    teachers: Sequence[TeacherTexts] = ()


@dataclass(frozen=True, slots=True)
class Inputs:
    """Holds all that the checks have read: records, or with a rollout section prompts; the same for held-out data."""

    policy: HFModel
    tokenizer: Any | None  # None where the checkpoint has none; records must then have token ids
    records: Records | None
    prompts: Sequence[Prompt]
    reference: HFModel | None = None  # where it is a checkpoint of its own
    teachers: Sequence[HFModel] = ()  # in the order of the configuration
    held_out_records: Records | None = None
    held_out_prompts: Sequence[Prompt] = ()
    notes: Sequence[str] = ()  # counts of kept and skipped prompts, for the log
