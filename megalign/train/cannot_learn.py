"""Finds what keeps a run from learning and says it once, with numbers: before the first step and during the run."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megalign.config.job import JobConfig
from megalign.data.dataset import GroupDataset
from megalign.data.group import Group, same_rewards
from megalign.data.pairing import own_sequences
from megalign.engines.step import StepBatch
from megalign.rollout.prompts import Prompt
from megalign.train.console import counted, shown
from megalign.train.schedule import learning_rate

MOST = 0.5  # a fraction above this counts as most
EQUAL_REWARDS, NO_GRADIENT = "equal rewards", "no gradient"  # kinds that rounds and steps report too


def doubts_about_rate(cfg: JobConfig, num_steps: int) -> Iterator[str]:
    """Yield doubts about the learning rate over the whole run."""
    optimizer, warmup = cfg.optimizer, cfg.optimizer.schedule.warmup_steps
    if optimizer.lr == 0:
        yield "optimizer.lr is 0: no step will change the weights"
        return
    highest = learning_rate(optimizer, min(num_steps, max(1, warmup)), num_steps)
    if highest == 0:
        yield (
            f"the learning rate is 0 at each of the {num_steps} steps: optimizer.schedule.name "
            f"{optimizer.schedule.name} with {warmup} warm-up steps begins at its end, min_lr "
            f"{optimizer.schedule.min_lr:g}"
        )
    elif warmup >= num_steps:
        yield (
            f"optimizer.schedule.warmup_steps is {warmup} and the run has {num_steps} steps: the learning rate still "
            f"rises at the last step, to {highest:.3g} (optimizer.lr: {optimizer.lr:g}); set warmup_steps below "
            f"{num_steps}"
        )


def doubts_about_number(cfg: JobConfig, dataset: GroupDataset) -> Iterator[str]:
    """Yield doubts about how many records there are, how long they are, and whether their responses are whole."""
    report, groups_per_step = dataset.report, cfg.data.groups_per_step or 1
    if report.num_kept < (1 - MOST) * report.num_records:
        worst = max(report.bad, key=lambda reason: report.bad[reason])
        yield (
            f"{report.num_records - report.num_kept} of {report.num_records} records are skipped, most of them for: "
            f"{worst} ({report.bad[worst]}), the first {report.first_bad[worst]}"
        )
    if groups_per_step > dataset.epoch_size:
        yield (
            f"data.groups_per_step is {groups_per_step} and an epoch has {counted(dataset.epoch_size, 'group')}: every "
            "step takes some of them more than once"
        )
    lengths = [len(group.prompt_ids) + len(response.ids) for group in dataset.groups for response in group.responses]
    yield from _doubts_about_budget(cfg, lengths, "sequences")
    raw = (response for group in dataset.groups for response in group.raw.get("responses") or ())
    mappings = (response for response in raw if isinstance(response, Mapping))
    marks = [response["finished"] for response in mappings if response.get("finished") is not None]
    if marks.count(False) > MOST * len(marks):
        yield (
            f"{marks.count(False)} of {len(marks)} responses say that they were cut before the model ended them "
            "(finished is false)"
        )


def doubts_about_contrast(dataset: GroupDataset) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) of doubts about records without a difference that the loss could learn."""
    same = [index for index, group in enumerate(dataset.groups) if _same_contrast(dataset, group)]
    if same:
        what = "responses" if dataset.pairing.kind == "samples" else "preferred and other response"
        text = (
            f"{len(same)} of {len(dataset)} records have the same tokens as {what}, the first "
            f"{dataset.origins[same[0]]}: there is nothing to tell apart"
        )
        if dataset.pairing.weak:  # negatives of other prompts are left to learn from
            yield "", text
        else:
            yield (NO_GRADIENT if len(same) == len(dataset) else ""), f"{text}, and their gradient is 0"
    if dataset.pairing.kind not in ("samples", "contrast"):  # pairs need two rewards that differ
        return
    equal = [_rewards(group) for group in dataset.groups if len(group.responses) > 1 and same_rewards(_rewards(group))]
    if len(equal) <= MOST * len(dataset):
        return
    where, rewards = f"{len(equal)} of {len(dataset)} records", [reward for group in equal for reward in group]
    if dataset.pairing.kind == "samples":
        yield EQUAL_REWARDS, _equal_rewards(where, rewards)
        return
    yield (
        "",
        (
            f"the rewards inside each group are equal in {where} ({_extent(rewards)}): the first response counts as "
            "the positive one there, and only responses to other prompts as negatives"
        ),
    )


def doubts_about_held_out(trained: Collection[Hashable], held_out: Sequence[Hashable], what: str) -> Iterator[str]:
    """Yield a doubt where most of the held-out records, or prompts, are among those that are trained on."""
    known = set(trained)
    seen = sum(item in known for item in held_out)
    if seen > MOST * len(held_out):
        yield (
            f"{seen} of {len(held_out)} held-out {what} of eval.path are also trained on: their evaluation does not "
            "show what is learned beyond them"
        )


def identity(group: Group) -> Hashable:
    """Return the tokens of a record, prompt and responses, to compare records by."""
    return group.prompt_ids, tuple(response.ids for response in group.responses)


def doubts_about_rounds(cfg: JobConfig, prompts: Sequence[Prompt]) -> Iterator[str]:
    """Yield doubts about the sizes of a job's rounds."""
    rollout, groups_per_step = cfg.rollout, cfg.data.groups_per_step
    assert rollout is not None and groups_per_step is not None
    if groups_per_step > rollout.prompts_per_round:
        yield (
            f"data.groups_per_step is {groups_per_step} and a round has {rollout.prompts_per_round} groups: every step "
            "takes some of them more than once"
        )
    if rollout.prompts_per_round > len(prompts):
        yield (
            f"rollout.prompts_per_round is {rollout.prompts_per_round} and rollout.path has {len(prompts)} prompts: "
            "every round samples some of them more than once"
        )
    lengths = [len(prompt.ids) + rollout.max_new_tokens for prompt in prompts]
    yield from _doubts_about_budget(cfg, lengths, "prompts with rollout.max_new_tokens to come")


def _doubts_about_budget(cfg: JobConfig, lengths: Sequence[int], what: str) -> Iterator[str]:
    budget = cfg.data.tokens_per_micro_batch
    longer = sum(length > budget for length in lengths)
    if longer:
        yield (
            f"data.tokens_per_micro_batch is {budget}: {longer} of {len(lengths)} {what} are longer, up to "
            f"{max(lengths)} tokens; each is a micro-batch of its own, and may need more memory than was planned"
        )


def _same_contrast(dataset: GroupDataset, group: Group) -> bool:
    """Tell whether all responses that the loss compares inside a group have the same tokens."""
    if dataset.pairing.kind == "single":
        return False
    picked = [response for _, response in own_sequences(group, dataset.pairing, seed=dataset.seed, epoch=0)]
    first = picked[0]
    return len(picked) > 1 and all((other.ids, other.scored) == (first.ids, first.scored) for other in picked[1:])


def _rewards(group: Group) -> list[float]:
    return [response.reward for response in group.responses if response.reward is not None]


def _equal_rewards(where: str, rewards: Sequence[float]) -> str:
    return (
        f"the rewards inside each group are equal in {where} ({_extent(rewards)}): such groups teach nothing; the "
        "reward or the sampling must make a difference"
    )


def _extent(rewards: Sequence[float]) -> str:
    between = f"all {shown(rewards[0])}" if same_rewards(rewards) else f"{shown(min(rewards))} to {shown(max(rewards))}"
    return f"{between} over {len(rewards)} responses"


@dataclass
class Doubts:
    """Collects reasons to doubt that a run learns, from its settings, data and steps; each kind is reported once."""

    cfg: JobConfig
    reported: set[str] = field(default_factory=set)

    def before(
        self,
        num_steps: int,
        dataset: GroupDataset | None,
        prompts: Sequence[Prompt],
        held_out: GroupDataset | Sequence[Prompt] = (),
    ) -> list[str]:
        """Find doubts that can be known before the first step; `dataset` is None in rounds, which have `prompts`."""
        doubts = list(doubts_about_rate(self.cfg, num_steps))
        if dataset is None:
            doubts += doubts_about_rounds(self.cfg, prompts)
            held_out_ids = [] if isinstance(held_out, GroupDataset) else [prompt.ids for prompt in held_out]
            return doubts + list(doubts_about_held_out([prompt.ids for prompt in prompts], held_out_ids, "prompts"))
        doubts += doubts_about_number(self.cfg, dataset)
        if isinstance(held_out, GroupDataset):
            trained = [identity(group) for group in dataset.groups]
            doubts += doubts_about_held_out(trained, [identity(group) for group in held_out.groups], "records")
        for kind, text in doubts_about_contrast(dataset):
            self.reported.add(kind)
            doubts.append(text)
        return doubts

    def of_round(self, number: int, records: Sequence[Mapping[str, Any]], stats: Mapping[str, float]) -> list[str]:
        """Find doubts about a sampled round, `number` from 1, in its records and statistics."""
        rollout = self.cfg.rollout
        assert rollout is not None
        doubts = []
        rewards = [[response["reward"] for response in record["responses"]] for record in records]
        if all(map(same_rewards, rewards)) and self._first(EQUAL_REWARDS):
            by_group = [[tuple(each["response_ids"]) for each in record["responses"]] for record in records]
            same = sum(len(set(responses)) == 1 for responses in by_group)
            text = _equal_rewards(
                f"all {len(records)} groups of round {number}", [reward for group in rewards for reward in group]
            )
            doubts.append(text + (f"; in {same} groups all {rollout.k} responses are the same" if same else ""))
        cut = stats.get("rollout_unfinished_fraction", 0.0)
        if cut > MOST and self._first("cut"):
            count = sum(map(len, rewards))
            doubts.append(
                f"{round(cut * count)} of {count} responses of round {number} are cut at rollout.max_new_tokens "
                f"{rollout.max_new_tokens}, before the model ended them"
            )
        skipped = int(stats.get("rollout_skipped_groups", 0.0))
        if skipped > MOST * len(records) and self._first("skipped"):
            doubts.append(
                f"loss {self.cfg.loss.name} has no use for {skipped} of {len(records)} groups of round {number}, and "
                f"its steps take the other {len(records) - skipped} more than once"
            )
        return doubts

    def of_step(self, step: int, batch: StepBatch, norm: float) -> list[str]:
        """Find doubts about a finished step, `step` from 1."""
        rewards: dict[int, list[float]] = {}
        for sequence in batch.sequences if self.cfg.loss.traits().pairing.kind == "samples" else ():
            if sequence.response.reward is not None:
                rewards.setdefault(sequence.group, []).append(sequence.response.reward)
        # Equal rewards explain a gradient of zero, and a step of few groups has them in healthy runs too; whole rounds
        # and files are judged in `of_round` and `before`.
        equal = bool(rewards) and all(map(same_rewards, rewards.values()))
        if norm == 0 and not equal and self._first(NO_GRADIENT):
            return [
                f"step {step}: the gradient norm is exactly 0 over {len(batch.sequences)} sequences, so the loss moves "
                "no weight"
            ]
        return []

    def _first(self, kind: str) -> bool:
        """Tell whether this kind was not reported before, and mark it as reported."""
        new = kind not in self.reported
        self.reported.add(kind)
        return new
