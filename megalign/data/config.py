"""Declare the `data` section: sources of records, their checks, and the sizes of steps and micro-batches."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from megalign.data.tokenize import TextOptions
from megalign.schema import NoneWord, PathText, Strict

Format = Literal["auto", "messages", "prompt_completion", "preference", "responses"]
TrainOn = Literal["last_assistant", "all_assistant"]


class Source(Strict):
    """Declares an entry of `data.sources`. An epoch takes floor(weight * records) of its records, at least one.

    Weight 1 takes each once an epoch, 2 twice, 0.5 one half in one epoch and the other half in the next.
    """

    path: PathText
    """File or `datasets` directory of records, as `data.path` takes."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Share of the records that an epoch takes; 2 takes each twice, 0.5 one half in one epoch and the other in the
    next."""


class TeacherFilter(Strict):
    """Declares `data.filter`: keep the records with the highest mean teacher score."""

    teacher_score_keep: Annotated[float, Field(gt=0, le=1)]
    """Share of the records to keep, those with the highest mean teacher score; the PoFT paper keeps 0.8."""


class DataConfig(Strict):
    """Declares `data`: the training records, in `path` or `sources`; neither with rounds, which sample them."""

    path: Annotated[PathText | None, NoneWord] = None
    """Records to train on: a file (JSONL, JSON, CSV, Parquet, compressed too) or a `datasets` directory."""
    sources: Annotated[list[Source], Field(min_length=1)] | None = None
    """Several inputs with weights instead of `path`."""
    format: Format = "auto"
    """Kind of the records: messages, prompt_completion, preference or responses; auto recognises it."""
    max_length: PositiveInt
    """Largest number of tokens of prompt and response together; a longer record is a bad record, never cut."""
    groups_per_step: PositiveInt | None = None
    """Number of groups (a prompt with its responses) of an optimizer step over the whole job; the global batch size."""
    tokens_per_micro_batch: PositiveInt
    """Tokens of whole sequences that a data rank computes at once; raise it until memory is full; a longer sequence
    gets a micro-batch of its own."""
    packing: bool = True
    """Whether sequences share rows of a micro-batch; false pads each to the longest, for comparison."""
    shuffle: bool = True
    """Whether each epoch has a new order, drawn from `run.seed`; false keeps the file's."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """What a bad record does: stop ends the run before its first step, skip counts it and goes on."""
    extra_fields: Literal["error", "ignore"] = "error"
    """What an unknown field of a record is: error makes the record a bad one, ignore lets it pass."""
    train_on: TrainOn = "last_assistant"
    """Turns of a conversation that are trained on: last_assistant, or all_assistant."""
    filter: TeacherFilter | None = None
    """Keeps a share of the records by their teacher scores; none keeps all."""
    special_tokens: Literal["auto", "none"] = "auto"
    """Tokens around plain strings: auto takes those that the tokenizer itself puts in front, none adds nothing."""
    date: str | None = None
    """Day (YYYY-MM-DD) that chat templates take for today; none is the day the job began."""

    @field_validator("sources")
    @classmethod
    def _one_input(cls, value: list[Source] | None, info: ValidationInfo) -> list[Source] | None:
        if value is not None and info.data.get("path") is not None:
            raise ValueError("path is given too; must be either path or sources; data.path=null unsets it")
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
        """Return the settings that affect how text becomes tokens."""
        return TextOptions(special_tokens=self.special_tokens, date=self.date)

    @field_validator("filter", mode="before")
    @classmethod
    def _none_by_name(cls, value: Any) -> Any:
        return None if value == "none" else value
