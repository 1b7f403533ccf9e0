"""Prepares a job's first step: teachers and references score, then the policy's engine and feed are built."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from megalign.config.job import JobConfig, total_steps
from megalign.convert.hf.config import noise_left_out
from megalign.convert.hf.model import HFModel
from megalign.engines.build import dtype_of, engine_package, temperature_of
from megalign.engines.protocol import Engine, Scorer
from megalign.rollout.rewards import choose_reward
from megalign.runtime.distributed import World
from megalign.scores.kept import KeptScores
from megalign.scores.teachers import with_teacher_scores
from megalign.train.cannot_learn import Doubts
from megalign.train.evaluation import Evaluation, evaluation_left, held_out_loss, held_out_reward
from megalign.train.feeds import DatasetFeed, Feed, Keep
from megalign.train.fingerprint import job_digest
from megalign.train.group_source import LiveSampling
from megalign.train.inputs import Inputs, Records
from megalign.train.job import Job
from megalign.train.outputs import Start
from megalign.train.plan import evaluation_plan, run_plan
from megalign.train.reporter import Reporter
from megalign.train.rounds import RoundFeed
from megalign.train.run_dir import SCORES


@dataclass(frozen=True, slots=True)
class Engines:
    """Builds a job's engines over the process groups of one connection, with their weights."""

    cfg: JobConfig
    inputs: Inputs
    start: Start
    connection: Any
    world: World

    def describe(self) -> str:
        """Return the layout and the kind of layers in words."""
        return engine_package(self.cfg).describe(self.cfg, self.inputs.policy, self.connection, self.world)

    def scorer(self, model: HFModel) -> Engine:
        """Build an engine that only scores, with the weights of a Hugging Face directory."""
        engine = self._build(model, trainable=False)
        engine.load_weights(model.folder)
        return engine

    def initial(self, *, trainable: bool) -> Engine:
        """Build the policy with the weights that training starts from."""
        engine = self._build(self.inputs.policy, trainable=trainable)
        engine.load_weights(self.inputs.policy.folder)
        if self.start.weights is not None:
            engine.load(self.start.weights)
        return engine

    def _build(self, model: HFModel, *, trainable: bool) -> Engine:
        return engine_package(self.cfg).build(self.cfg, model, self.connection, self.world, trainable=trainable)


def prepare(engines: Engines, report: Reporter, *, began: float) -> Job:
    """Do everything up to the first step; began: time.perf_counter() at the job's start."""
    cfg, inputs, start = engines.cfg, engines.inputs, engines.start
    report.say(f"ranks {engines.world.size}: {engines.describe()}; {cfg.run.dtype}; loss {cfg.loss.name}")
    left_out = noise_left_out(inputs.policy.hf)
    for line in (*([left_out] if left_out else []), *inputs.notes):
        report.say(line)
    ready = _for_rounds(engines) if inputs.records is None else _for_records(engines, inputs.records, report)
    if ready.policy.note:
        report.say(ready.policy.note)
    report.total = ready.num_steps
    if start.weights is not None:
        report.say(f"initial weights from {start.weights}")
    job = Job(
        cfg=cfg,
        inputs=inputs,
        start=start,
        world=engines.world,
        engine=ready.policy,
        feed=ready.feed,
        evaluation=ready.evaluation,
        num_steps=ready.num_steps,
        report=report,
        doubts=Doubts(cfg),
        began=began,
    )
    _report_plan(job)
    return job


class Ready(NamedTuple):
    """Holds the policy with its initial weights, its feed and its evaluation."""

    policy: Engine
    feed: Feed
    evaluation: Evaluation | None
    num_steps: int


def _for_rounds(engines: Engines) -> Ready:
    """Build the policy, its sampler and the scorer of a fixed reference."""
    # Imported here: jobs on records need not wait for transformers.
    from megalign.rollout.transformers_sampler import empty_sampler

    cfg, inputs = engines.cfg, engines.inputs
    assert cfg.rollout is not None
    policy = engines.initial(trainable=True)
    fixed = _fixed_reference(engines, policy)
    dtype, world = dtype_of(cfg), engines.world
    sampler = empty_sampler(inputs.policy.folder, inputs.tokenizer, dtype=dtype, device=world.device, beat=world.beat)
    reward = choose_reward(cfg.rollout.reward)
    source = LiveSampling(cfg, policy, sampler, inputs.tokenizer, inputs.prompts, reward, world.beat)
    vocab_size = inputs.policy.facts.vocab_size
    feed = RoundFeed(cfg, source, policy, fixed, inputs.tokenizer, vocab_size, len(inputs.prompts))
    evaluation = partial(held_out_reward, source, inputs.held_out_prompts)
    return Ready(policy, feed, evaluation, total_steps(cfg, 0))


def _fixed_reference(engines: Engines, policy: Engine) -> Scorer | None:
    """Build the scorer of a reference other than the round's policy: its own engine, or the policy without adapters."""
    cfg, inputs = engines.cfg, engines.inputs
    if not cfg.loss.traits().reference or cfg.reference.source == "round_start":
        return None
    if inputs.reference is not None:
        return engines.scorer(inputs.reference)
    return policy.base() if cfg.lora is not None else engines.initial(trainable=False)


def _for_records(engines: Engines, records: Records, report: Reporter) -> Ready:
    """Score the records with every fixed model, and build the policy."""
    cfg, inputs = engines.cfg, engines.inputs
    # Teachers and a separate reference come first, so that their engines are freed before the policy's is built.
    keep = partial(_kept, engines, report)
    feed, held_out = _feed(engines, records, report, keep), None
    if inputs.held_out_records is not None and evaluation_left(cfg, engines.start.step, feed.num_steps):
        held_out = _held_out(engines, inputs.held_out_records, report, keep)
    feeds = [feed] if held_out is None else [feed, held_out]
    if inputs.reference is not None and cfg.loss.traits().reference:
        load = cache(partial(engines.scorer, inputs.reference))
        for each in feeds:
            each.score_reference(load, report, keep)
        del load
    policy = engines.initial(trainable=True)
    for each in feeds:
        each.score_policy(policy, report, keep)
    evaluation: Evaluation | None = None
    if held_out is not None:
        evaluation = partial(held_out_loss, cfg, policy, held_out)
    return Ready(policy, feed, evaluation, feed.num_steps)


def _kept(engines: Engines, report: Reporter, name: str, by_token: bool) -> KeptScores:
    """Return where the run keeps the scores of `name`; they hold for its models and its precision."""
    cfg, job = engines.cfg, engines.start.job
    models = job_digest({key: job[key] for key in ("model", "reference", "teachers", "checkpoint")})
    about = {"models": models, "engine": cfg.engine.name, "dtype": cfg.run.dtype, "temperature": temperature_of(cfg)}
    folder = Path(cfg.run.dir) / SCORES
    return KeptScores(folder, name, about, by_token=by_token, writes=engines.world.is_main, say=report.say)


def _feed(engines: Engines, records: Records, report: Reporter, keep: Keep) -> DatasetFeed:
    """Let the teachers score the records that are needed, and filter them by their scores."""
    cfg, dataset, after = engines.cfg, records.dataset, engines.start.step
    report.say(f"training data: {dataset.report.line()}")
    needed = None
    if after and cfg.data.filter is None:  # a filter needs every score
        needed = DatasetFeed(cfg, dataset).groups_after(after)
    dataset = with_teacher_scores(
        cfg,
        dataset,
        records.teachers,
        engines.scorer,
        needed=needed,
        say=report.say,
        progress=report.phase,
        keep=lambda name: keep(name, False),
    )
    if cfg.data.filter is not None:
        dataset = dataset.keep_highest(cfg.data.filter.teacher_score_keep)
    return DatasetFeed(cfg, dataset, after=after)


def _held_out(engines: Engines, records: Records, report: Reporter, keep: Keep) -> DatasetFeed:
    """Let the teachers score the held-out records, which are never filtered."""
    cfg = engines.cfg
    report.say(f"held-out data: {records.dataset.report.line()}")
    return DatasetFeed(
        cfg,
        with_teacher_scores(
            cfg,
            records.dataset,
            records.teachers,
            engines.scorer,
            say=report.say,
            progress=report.phase,
            keep=lambda name: keep(f"{name} (held-out data)", False),
        ),
        held_out=True,
    )


def _report_plan(job: Job) -> None:
    """Report how long the run is, what it evaluates, and what may keep it from learning."""
    cfg, inputs, report = job.cfg, job.inputs, job.report
    report.rounds = 0 if cfg.rollout is None else cfg.rollout.rounds
    dataset = job.feed.dataset if isinstance(job.feed, DatasetFeed) else None
    held_out = inputs.held_out_prompts if inputs.held_out_records is None else inputs.held_out_records.dataset
    report.say(run_plan(cfg, job.num_steps, len(inputs.prompts) if dataset is None else dataset.epoch_size))
    if cfg.checkpoint.every is None and job.save_every:
        report.say(f"checkpoint.every is not set: a checkpoint every {job.save_every} steps")
    if cfg.eval.path is not None:
        report.say(evaluation_plan(cfg, job.num_steps, len(held_out)))
    for doubt in job.doubts.before(job.num_steps, dataset, inputs.prompts, held_out):
        report.warn(doubt)
