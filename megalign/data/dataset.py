"""Load records into groups before the first step, and list the sequences of a step's groups."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megalign.data.chat import template_words
from megalign.data.config import DataConfig, Source
from megalign.data.formats import Reading, recognise
from megalign.data.group import Group, Pairing, TokenSequence
from megalign.data.limits import check_tokens
from megalign.data.order import Item, Span, step_items
from megalign.data.pairing import NO_NEGATIVE, WeakPool, check_pairing, own_sequences
from megalign.data.reading import RawRecord, read_raw
from megalign.data.record_counts import RecordCounts
from megalign.data.records import BadRecord, bad_field, check_record
from megalign.data.tokenize import encode_record, token_fields
from megalign.schema import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class GroupDataset:
    """Holds the groups of all accepted records, in file order, and picks the sequences that a loss takes from them."""

    groups: list[Group]
    spans: tuple[Span, ...]  # the groups of each source, in the order of `groups`
    pairing: Pairing
    seed: int
    max_length: int
    report: RecordCounts
    weak_pool: WeakPool | None  # of all valid records, before filtering; None: the loss takes no weak negatives
    origins: list[str]  # where each group was read, for errors

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def epoch_size(self) -> int:
        """Return the number of groups in one epoch."""
        return sum(span.per_epoch for span in self.spans)

    def step_items(self, step: int, *, groups_per_step: int, shuffle: bool) -> list[Item]:
        """Return (epoch, index) of each group that step `step` (from 0) trains on."""
        return step_items(step, self.spans, groups_per_step=groups_per_step, seed=self.seed, shuffle=shuffle)

    def sequences(self, items: Sequence[Item]) -> tuple[list[TokenSequence], int]:
        """Return the sequences of the step's items, their groups numbered from 0, and the number of groups."""
        flat = []
        for number, (epoch, index) in enumerate(items):
            group = self.groups[index]
            picked = own_sequences(group, self.pairing, seed=self.seed, epoch=epoch)
            if self.weak_pool is not None:
                weak = self.weak_pool.draw(group, epoch=epoch, num_strong=len(picked) - 1)
                picked += [("weak", response) for response in weak]
            scores = group.teacher_scores.values()
            teacher = sum(scores) / len(scores) if scores else None
            flat += [
                TokenSequence(group.record, number, role, group.prompt_ids, response, teacher)
                for role, response in picked
            ]
        return flat, len(items)

    def with_teacher_scores(self, scores: Sequence[Mapping[str, float]]) -> GroupDataset:
        """Return a copy whose groups have the given teacher scores, one mapping per group."""
        groups = [
            replace(group, teacher_scores=dict(group_scores))
            for group, group_scores in zip(self.groups, scores, strict=True)
        ]
        return replace(self, groups=groups)

    def keep_highest(self, share: float) -> GroupDataset:
        """Return a copy with the floor(share * records) groups of highest mean teacher score, at least one.

        Ties go to the earlier record; file order is kept.
        """
        for group, origin in zip(self.groups, self.origins, strict=True):
            if not group.teacher_scores:
                raise UserError(f"{origin}: field teacher_scores is missing; data.filter.teacher_score_keep needs it")
        means = [sum(group.teacher_scores.values()) / len(group.teacher_scores) for group in self.groups]
        ranked = sorted(range(len(means)), key=lambda index: -means[index])
        kept = sorted(ranked[: max(1, math.floor(share * len(means) + 1e-9))])
        spans = []
        first = 0
        for span in self.spans:
            inside = sum(first <= index < first + span.num_records for index in kept)
            spans.append(Span(inside, span.weight))
            first += span.num_records
        return replace(
            self,
            groups=[self.groups[index] for index in kept],
            origins=[self.origins[index] for index in kept],
            spans=tuple(spans),
        )


def load_dataset(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    pairing: Pairing,
    seed: int,
    vocab_size: int,
    old_temperature: float | None = None,
) -> GroupDataset:
    """Read, check and tokenise all records of `data.path` or `data.sources`.

    Record numbers run over all sources, bad records included; pinned weak negatives count from 0 in their own source.
    old_temperature: the sampling temperature that records with behaviour log-probs must have, where the loss uses these
    as the old policy's.
    """
    loader = _Loader(cfg, tokenizer, pairing=pairing, seed=seed, vocab_size=vocab_size, old_temperature=old_temperature)
    sources = [Source(path=cfg.path)] if cfg.path is not None else cfg.sources or []
    if not sources:
        raise UserError("data.path is missing; must be a JSONL file, a datasets directory, or data.sources")
    for index, source in enumerate(sources):
        name = "data.path" if cfg.path is not None else f"data.sources[{index}].path"
        loader.add_source(read_raw(source.path, field=name), name=f"{name} ({source.path})", weight=source.weight)
    return loader.finish()


def from_records(
    records: Iterable[Mapping[str, Any]],
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    pairing: Pairing,
    seed: int,
    vocab_size: int,
    origin: str = "record",
) -> GroupDataset:
    """Check and tokenise records in memory, such as a round's; errors name them `origin:number`."""
    loader = _Loader(cfg, tokenizer, pairing=pairing, seed=seed, vocab_size=vocab_size)
    raw = (RawRecord(f"{origin}:{number}", record) for number, record in enumerate(records))
    loader.add_source(raw, name=origin, weight=1.0)
    return loader.finish()


class _Loader:
    """Collects groups over sources and counts refused records."""

    def __init__(
        self,
        cfg: DataConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        pairing: Pairing,
        seed: int,
        vocab_size: int,
        old_temperature: float | None = None,
    ) -> None:
        self.cfg, self.tokenizer, self.pairing = cfg, tokenizer, pairing
        self.old_temperature = old_temperature
        self.options = cfg.text_options
        self.template_words = template_words(getattr(tokenizer, "chat_template", None))
        self.seed, self.vocab_size = seed, vocab_size
        self.report = RecordCounts()
        self.groups: list[Group] = []
        self.origins: list[str] = []
        self.sources: list[tuple[int, int, float]] = []  # first record, number of records, weight

    def add_source(self, raws: Iterable[RawRecord], *, name: str, weight: float) -> None:
        first = self.report.num_records
        raws = iter(raws)
        for raw in raws:
            number = self.report.num_records
            self.report.num_records += 1
            try:
                self.groups.append(self._group(raw, number, first))
                self.origins.append(raw.origin)
            except BadRecord as bad:
                shared = ""
                if self.cfg.on_bad_record == "stop":
                    shared = self._shared(bad, raws, num_good=number - first, first=first)
                self._reject(raw.origin, bad, shared=shared)
            except UserError as error:
                raise UserError(f"{raw.origin}: {error}") from None
        if self.report.num_records == first:
            raise UserError(f"{name} holds no records; must be one or more")
        self.sources.append((first, self.report.num_records - first, weight))

    def finish(self) -> GroupDataset:
        """Check weak negatives, which requires all records, and return the data set."""
        pool = None
        kept: Sequence[int] = range(len(self.groups))
        if self.pairing.kind == "contrast" and self.pairing.weak:
            pool = WeakPool(self.groups, self.pairing, seed=self.seed, max_length=self.cfg.max_length)
            kept = [index for index in kept if self._has_negatives(index, pool)]
        if not kept:
            problem = f"{self.report.first_problem()}; {self.report.line()}"
            raise UserError(f"no record is usable; the first problem: {problem}")
        groups = [self.groups[index] for index in kept]
        spans = [
            Span(sum(first <= group.record < first + count for group in groups), weight)
            for first, count, weight in self.sources
        ]
        self.report.num_kept = len(groups)
        return GroupDataset(
            groups=groups,
            spans=tuple(spans),
            pairing=self.pairing,
            seed=self.seed,
            max_length=self.cfg.max_length,
            report=self.report,
            weak_pool=pool,
            origins=[self.origins[index] for index in kept],
        )

    def _shared(self, bad: BadRecord, rest: Iterator[RawRecord], *, num_good: int, first: int) -> str:
        """Return text on how many of the source's other records have the same faults as `bad`; empty if none has.

        Faults that only tokens show are searched by tokenising the other records, as a load without faults would.
        """
        num_others, sizes = num_good, []
        for raw in rest:
            num_others += 1
            try:
                if bad.kinds:
                    self._checked(raw)
                else:
                    self._group(raw, first + num_others, first)
            except BadRecord as other:
                if bad.kinds <= other.kinds if bad.kinds else bad.reason == other.reason:
                    sizes.append(other.size)
            except UserError:
                break  # it stops the job by itself, and is reported once this record is corrected
        longest = f"; the longest has {max(sizes)} tokens" if any(sizes) else ""
        return f" (the same in {len(sizes)} of the {num_others} other records{longest})" if sizes else ""

    def _reject(self, origin: str, bad: BadRecord, *, shared: str = "") -> None:
        self.report.reject(origin, bad, on_bad_record=self.cfg.on_bad_record, shared=shared)

    def _checked(self, raw: RawRecord) -> tuple[Reading, str]:
        """Return the record in our own field names and its format; raise `BadRecord` for all its faults."""
        reading = recognise(raw.fields(), format=self.cfg.format)
        try:
            name = check_record(
                reading.record,
                format=self.cfg.format,
                extra_fields=self.cfg.extra_fields,
                template_words=self.template_words,
            )
        except BadRecord as bad:
            raise reading.named(bad) from None
        return reading, name

    def _group(self, raw: RawRecord, number: int, first: int) -> Group:
        reading, name = self._checked(raw)
        try:
            group = self._encoded(reading.record, name, number, first)
        except (BadRecord, UserError) as error:
            raise reading.named(error) from None
        if reading.name:
            self.report.notes[f"read as {reading.summary()}"] += 1
        return group

    def _encoded(self, record: dict[str, Any], name: str, number: int, first: int) -> Group:
        cfg = self.cfg
        notes: Counter[str] = Counter()
        prompt_ids, responses = encode_record(
            record, self.tokenizer, format=name, train_on=cfg.train_on, options=self.options, notes=notes
        )
        group = Group(
            record=number,
            prompt_ids=prompt_ids,
            responses=responses,
            paired=name == "preference",
            teacher_scores=record.get("teacher_scores", {}),
            weak=tuple((first + pinned, response) for pinned, response in record.get("weak", [])),
            raw=record,
        )
        fields = token_fields(record, name)
        check_tokens(group, fields, self.tokenizer, max_length=cfg.max_length, vocab_size=self.vocab_size)
        check_pairing(group, self.pairing, format=name)
        self._check_temperature(group)
        self.report.notes.update(notes)
        return group

    def _check_temperature(self, group: Group) -> None:
        """Refuse behaviour log-probs of another temperature where the loss uses them as the old policy's."""
        index = next(
            (index for index, response in enumerate(group.responses) if response.behaviour_logp is not None), None
        )
        if self.old_temperature is None or index is None:
            return
        if "temperature" not in group.raw:
            self.report.notes[f"have logp without temperature, which is assumed to be {self.old_temperature:g}"] += 1
        elif group.raw["temperature"] != self.old_temperature:
            raise bad_field(
                "temperature",
                group.raw["temperature"],
                f"{self.old_temperature:g}, the training temperature, because this loss uses responses[{index}].logp "
                "as the old policy's; or responses must be without logp",
                reason="temperature",
            )

    def _has_negatives(self, index: int, pool: WeakPool) -> bool:
        group = self.groups[index]
        first, count, _ = next(source for source in reversed(self.sources) if source[0] <= group.record)
        try:
            pool.check_pins(group, first_record=first, num_records=count)
            num_strong = len(own_sequences(group, self.pairing, seed=self.seed, epoch=0)) - 1
            # With num_strong=1 the draw returns nothing instead of raising: this is to be counted as a bad record.
            if not num_strong and not pool.draw(group, epoch=0, num_strong=1):
                raise BadRecord("no negative", f"field responses: {NO_NEGATIVE.format(max_length=self.cfg.max_length)}")
        except BadRecord as bad:
            self._reject(self.origins[index], bad)
            return False
        return True
