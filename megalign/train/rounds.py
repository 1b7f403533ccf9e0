"""Feeds training steps from rounds: a source supplies groups, which are scored and used for a few updates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megalign.config.job import JobConfig
from megalign.config.sections import RolloutConfig
from megalign.data.dataset import GroupDataset, from_records
from megalign.engines.protocol import Engine, Scorer
from megalign.engines.step import StepBatch
from megalign.rollout.collect import without_texts
from megalign.runtime.ranks import SharedError, on_every_rank
from megalign.train.group_source import GroupSource
from megalign.train.round_scores import RoundScores, Update, score_round

ATTEMPTS = 8  # samplings of one round before the job gives up


@dataclass
class RoundTimes:
    """Measures a round: the seconds of sampling, of scoring and since its start, and the tokens trained on."""

    began: float = field(default_factory=time.perf_counter)
    tokens: int = 0  # trained on so far, as the metric of a step counts them
    sampling: float = 0.0
    scoring: float = 0.0

    def seconds(self) -> float:
        """Return the seconds since the round began, including saves and evaluations between its steps."""
        return time.perf_counter() - self.began

    def sampled(self) -> None:
        """Record the sampling time; called when sampling and rewarding, which come first, are done."""
        self.sampling = self.seconds()

    def scored(self) -> None:
        """Record the scoring time; called when scoring, which comes next, is done."""
        self.scoring = self.seconds() - self.sampling

    def metrics(self, *, first: bool) -> dict[str, float]:
        """Return the times to report with a step; sampling and scoring count for the round's first step only."""
        seconds = self.seconds()
        return {
            "round_seconds": seconds,
            "sampling_seconds": self.sampling if first else 0.0,
            "scoring_seconds": self.scoring if first else 0.0,
            "round_tokens_per_second": self.tokens / seconds,
        }


@dataclass
class RoundFeed:
    """Supplies steps with the rounds' groups; `fixed` scores a reference other than the round's policy."""

    cfg: JobConfig
    source: GroupSource
    engine: Engine
    fixed: Scorer | None
    tokenizer: Any
    vocab_size: int
    num_prompts: int  # of an epoch
    records: list[dict[str, Any]] = field(default_factory=list)  # without texts
    round_number: int = -1
    _dataset: GroupDataset | None = None
    _scores: RoundScores = field(default_factory=RoundScores)
    _stats: dict[str, float] = field(default_factory=dict)
    _times: RoundTimes = field(default_factory=RoundTimes)

    @property
    def rollout(self) -> RolloutConfig:
        """Return the section `rollout` of the configuration."""
        assert self.cfg.rollout is not None
        return self.cfg.rollout

    def begins_round(self, step: int) -> bool:
        """Tell whether the step (from 0) is a round's first."""
        return step % self.rollout.updates_per_round == 0

    def batch(self, step: int) -> StepBatch:
        """Return the step's global batch; a round's first step gets and scores the round's groups."""
        number, update = divmod(step, self.rollout.updates_per_round)
        if number != self.round_number:
            self._begin(number)
        sequences, num_groups = self._sequences(update)
        self._times.tokens += sum(len(sequence) for sequence in sequences)
        return self._scores.batch(self.cfg, update, sequences, num_groups)

    def position(self, step: int) -> dict[str, float]:
        """Return `round` (from 1; 0 before the first) and `epoch` after `step` steps.

        In an epoch of rounds every prompt is sampled from once.
        """
        number = -(-step // self.rollout.updates_per_round)
        return {"epoch": number * self.rollout.prompts_per_round / self.num_prompts, "round": number}

    def stats(self, step: int) -> Mapping[str, float]:
        """Return the round's metrics and its times; `step` is the one just taken."""
        update = step % self.rollout.updates_per_round
        # The first update's step reports its own mismatch.
        mismatch = self._scores.mismatch[update] if update and self._scores.mismatch else {}
        return {**self._stats, **mismatch, **self._times.metrics(first=update == 0)}

    def origins(self, step: int, members: Sequence[int]) -> list[str]:
        """Return where the prompts of these sequences of a step (from 0) were read, as `path:line`."""
        number, update = divmod(step, self.rollout.updates_per_round)
        sequences, _ = self._sequences(update)
        prompts = self.source.origins(number)
        return [prompts[sequences[member].record] for member in members]

    def state(self) -> dict[str, Any]:
        """Return the round in progress for a checkpoint: a resume trains on the same samples and scores."""
        return {
            "round_number": self.round_number,
            "records": self.records,
            "stats": self._stats,
            "scores": self._scores.plain(),
            "times": (self._times.seconds(), self._times.tokens),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue the round that `state` returned."""
        if state["round_number"] < 0:
            return
        self.round_number, self.records = state["round_number"], state["records"]
        self._dataset = self._read()
        self._stats = state["stats"]
        by_token = self.cfg.loss.traits().level == "token"
        self._scores = RoundScores.from_plain(state["scores"], by_token=by_token)
        seconds, tokens = state["times"]
        self._times = RoundTimes(began=time.perf_counter() - seconds, tokens=tokens)

    def _begin(self, number: int) -> None:
        """Get the round's groups and score them."""
        self._times = RoundTimes()
        self._take_groups(number)
        self._times.sampled()
        updates = [self._sequences(update) for update in range(self.rollout.updates_per_round)]
        self._scores = score_round(self.cfg, self.engine, self.fixed, updates)
        self._times.scored()

    def _sequences(self, update: int) -> Update:
        """Return the update's `groups_per_step` groups: the round's next ones, from the first again after the last."""
        count = self.cfg.data.groups_per_step
        assert count is not None and self._dataset is not None
        indices = range(update * count, (update + 1) * count)
        return self._dataset.sequences([divmod(index, len(self._dataset)) for index in indices])

    def _take_groups(self, number: int) -> None:
        """Get the round's groups; if the loss can use none of them, sample others."""
        self.round_number = number
        for attempt in range(ATTEMPTS):
            done = self.source.round(number, attempt)
            self.records = [without_texts(record) for record in done.records]
            self._stats = {f"rollout_{name.removeprefix('rollout_')}": value for name, value in done.stats.items()}
            try:
                self._dataset = self._read()
            except SharedError as error:
                problem = str(error)
                continue
            report = self._dataset.report
            self._stats["rollout_skipped_groups"] = float(report.num_records - report.num_kept)
            return
        raise SharedError(
            f"rollout.reward is {self.rollout.reward!r}: loss {self.cfg.loss.name} has no use for any group of round "
            f"{number + 1}, sampled {ATTEMPTS} times; must tell some responses to a prompt apart; the last problem: "
            f"{problem}"
        )

    def _read(self) -> GroupDataset:
        """Turn the round's groups into training data, without those that the loss cannot use (DPO: equal rewards)."""
        data = self.cfg.data.model_copy(update={"on_bad_record": "skip"})
        return on_every_rank(
            lambda: from_records(
                self.records,
                data,
                self.tokenizer,
                pairing=self.cfg.loss.traits().pairing,
                seed=self.cfg.run.seed + self.round_number,
                vocab_size=self.vocab_size,
                origin=f"round {self.round_number + 1} group",
            )
        )
