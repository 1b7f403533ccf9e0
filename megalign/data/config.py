"""The `data` section: where records come from, what passes, and how a step is cut into micro-batches."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from megalign.data.tokenize import TextOptions
from megalign.schema import NoneWord, PathText, Strict

Format = Literal["auto", "messages", "prompt_completion", "preference", "responses"]
TrainOn = Literal["last_assistant", "all_assistant"]


class Source(Strict):
    """One of several inputs. An epoch takes floor(weight * records) of its records, at least one.

    Weight 1 takes each once an epoch, 2 twice, 0.5 one half in one epoch and the other half in the next.
    """

    path: PathText
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class TeacherFilter(Strict):
    """Keep this share of the records, those with the highest mean teacher score."""

    teacher_score_keep: Annotated[float, Field(gt=0, le=1)]


class DataConfig(Strict):
    """Settings of the training records: `path` or `sources`; neither with rounds, which make the records."""

    path: Annotated[PathText | None, NoneWord] = None
    sources: Annotated[list[Source], Field(min_length=1)] | None = None
    format: Format = "auto"
    max_length: PositiveInt  # prompt and response in tokens; a longer record is a bad record, never cut
    groups_per_step: PositiveInt | None = None
    tokens_per_micro_batch: PositiveInt  # may be below max_length: a longer sequence is a micro-batch of its own
    packing: bool = True
    shuffle: bool = True
    on_bad_record: Literal["stop", "skip"] = "stop"
    extra_fields: Literal["error", "ignore"] = "error"
    train_on: TrainOn = "last_assistant"
    filter: TeacherFilter | None = None
    special_tokens: Literal["auto", "none"] = "auto"  # around plain strings: the tokenizer's own, or none
    date: str | None = None  # YYYY-MM-DD that chat templates take for today; none: the day the text is tokenised

    @field_validator("sources")
    @classmethod
    def _one_input(cls, value: list[Source] | None, info: ValidationInfo) -> list[Source] | None:
        if value is not None and info.data.get("path") is not None:
            raise ValueError("path is given too; allowed: either path or sources; data.path=null unsets it")
        return value

    @field_validator("date", mode="before")
    @classmethod
    def _day(cls, value: Any) -> Any:
        """Accept a date that YAML parsed (2026-01-31 without quotes) as well as text."""
        if value is None or value == "none":
            return None
        text = value.isoformat() if type(value) is date else value
        try:
            good = isinstance(text, str) and date.fromisoformat(text).isoformat() == text
        except ValueError:
            good = False
        if not good:
            raise ValueError("must be a day as YYYY-MM-DD, or none")
        return text

    @property
    def text_options(self) -> TextOptions:
        """Return the settings that change which tokens a text becomes."""
        return TextOptions(special_tokens=self.special_tokens, date=self.date)

    @field_validator("filter", mode="before")
    @classmethod
    def _none_by_name(cls, value: Any) -> Any:
        return None if value == "none" else value
