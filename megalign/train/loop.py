"""The training loop: read everything, score what stays fixed, take the steps, save, export.

Run: python -m megalign train CONFIG.yaml [key.sub=value ...]
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from megalign.config import JobConfig, total_steps
from megalign.convert import ModelConfig
from megalign.convert.hf_config import noise_left_out
from megalign.engines.groups import Groups
from megalign.engines.megatron import MegatronEngine
from megalign.engines.step import StepBatch, StepResult, accumulate
from megalign.runtime.distributed import World, make_deterministic
from megalign.runtime.status import DONE, FAILED, STOPPED, Ending, during, write_status
from megalign.train.cannot_learn import Doubts
from megalign.train.check import Inputs, Records, check
from megalign.train.evaluation import evaluation_due, held_out_metrics
from megalign.train.feeds import DatasetFeed, Feed, with_teachers
from megalign.train.job import Job, export_model, keep_instead, resume, save
from megalign.train.outputs import Start, check_outputs, job_date, with_date
from megalign.train.plan import evaluation_plan, run_plan
from megalign.train.report import Reporter, start_log, utc_now
from megalign.train.round_report import report_round
from megalign.train.rounds import RoundFeed, fixed_reference, live_sampler
from megalign.train.run_dir import open_run_dir
from megalign.train.schedule import keeps_last, learning_rate
from megalign.train.session import (
    build_engine,
    cutting_of,
    gather,
    groups_of,
    layers_text,
    layout_text,
    on_every_rank,
)
from megalign.train.step_metrics import dump_step, position, step_metrics
from megalign.train.summary import report_summary

# Where the two passes of a step may differ by rounding of non-deterministic kernels and no more.
AUTO_PASS_GAP = {"fp32": 1e-3, "bf16": 0.1}
PASS_MODES = {
    "two_pass": "the whole batch's log-probs first, then forward and backward",
    "single_pass": "forward and backward at once",
    "known_scores": "the log-probs are already there, so forward and backward at once",
}


def train(cfg: JobConfig, world: World, ending: Ending) -> int:
    """Run the job to its end; exit code 0, or 75 when it stopped early after saving. Called on every rank."""
    if cfg.run.deterministic:
        make_deterministic()
    run_dir, started = Path(cfg.run.dir), time.perf_counter()
    # Rank 0's day is every rank's, and a resumed run's is the one that it began on.
    cfg = with_date(cfg, gather(on_every_rank(lambda: job_date(cfg) if world.is_main else None))[0])
    inputs = on_every_rank(lambda: check(cfg, world.size))
    # One rank's findings are every rank's: the directory changes while others would still look at it.
    start: Start = gather(on_every_rank(lambda: check_outputs(cfg, inputs) if world.is_main else None))[0]
    kept = on_every_rank(lambda: _open_run_dir(cfg, start) if world.is_main else [])
    ending.take_over()
    start_log(run_dir, main=world.is_main)
    groups = groups_of(cfg)
    # The total is set once the data are known; teachers are scored before that.
    with Reporter(run_dir, 0, main=world.is_main, trackers=cfg.trackers) as report:
        for line in (*kept, *start.notes):
            report.say(line)
        if not cfg.checkpoint.every and cfg.export.hf_dir is None:
            report.say(
                "neither checkpoint.every nor export.hf_dir is set: a checkpoint after the last step keeps the model"
            )
        with during("before the first step", None):
            job = _prepare(cfg, inputs, world, groups, report, started, start)
        with _signals(job):
            with during(f"loading {start.checkpoint}", None):
                resume(job)
            return _run(job)


def _open_run_dir(cfg: JobConfig, start: Start) -> list[str]:
    sources = [one.path for one in cfg.data.sources or ()] + [cfg.data.path, cfg.eval.path]
    sources += [None if cfg.rollout is None else cfg.rollout.path]
    inputs = [Path(path) for path in sources if path is not None]
    inputs += [path for path in (start.weights, start.checkpoint) if path is not None]
    return open_run_dir(
        cfg,
        resumed=start.checkpoint if start.own else None,
        rolled_back=start.rolled_back,
        changed=bool(start.changed),
        inputs=inputs,
    )


def _prepare(
    cfg: JobConfig,
    inputs: Inputs,
    world: World,
    groups: Groups,
    report: Reporter,
    started: float,
    start: Start,
) -> Job:
    """Everything up to the first step."""
    weights = start.weights
    layers = layers_text(cfg, inputs.model, world)
    report.say(f"ranks {world.size}: {layout_text(groups)}; {layers}; {cfg.run.dtype}; loss {cfg.loss.name}")
    if left_out := noise_left_out(inputs.hf_dir):
        report.say(left_out)
    for note in inputs.notes:
        report.say(note)

    def feed_of(records: Records, *, held_out: bool) -> DatasetFeed:
        report.say(f"{'held-out data' if held_out else 'training data'}: {records.dataset.report.line()}")
        return DatasetFeed(cfg, with_teachers(cfg, records, groups, world, report, held_out=held_out))

    def scorer(model: ModelConfig) -> MegatronEngine:
        return build_engine(cfg, model, groups, world, trainable=False)

    def load_initial(engine: MegatronEngine) -> None:
        engine.load_weights(inputs.hf_dir)
        if weights is not None:
            engine.load(weights)

    # Teachers and a reference of its own come first: their engines are gone before the policy's is built.
    dataset_feed = None if inputs.records is None else feed_of(inputs.records, held_out=False)
    held_out = None if inputs.held_out_records is None else feed_of(inputs.held_out_records, held_out=True)
    num_steps = total_steps(cfg, 0 if dataset_feed is None else dataset_feed.dataset.epoch_size)
    feeds = [(one, held) for one, held in ((dataset_feed, False), (held_out, True)) if one is not None]
    if feeds and inputs.reference is not None and cfg.loss.traits().reference:
        reference = scorer(inputs.reference[1])
        reference.load_weights(inputs.reference[0])
        for one, held in feeds:
            one.score_reference(reference, num_steps, report, held_out=held)
        del reference
    engine = build_engine(cfg, inputs.model, groups, world, trainable=True)
    load_initial(engine)
    feed: Feed
    if dataset_feed is None:
        fixed = fixed_reference(cfg, inputs, engine, scorer, load_initial)
        feed = RoundFeed(cfg, inputs, engine, live_sampler(cfg, inputs, world.device), fixed)
    else:
        feed = dataset_feed
        for one, held in feeds:
            one.score_policy(engine, num_steps, report, held_out=held)
    report.total = num_steps
    if weights is not None:
        report.say(f"initial weights from {weights}")
    doubts = Doubts(cfg)
    _report_plan(cfg, inputs, report, doubts, num_steps, dataset_feed, held_out)
    return Job(cfg, inputs, start, world, engine, feed, num_steps, report, held_out, doubts, started)


def _report_plan(
    cfg: JobConfig,
    inputs: Inputs,
    report: Reporter,
    doubts: Doubts,
    num_steps: int,
    feed: DatasetFeed | None,
    held_out: DatasetFeed | None,
) -> None:
    """Report how long the run is, what it evaluates, and what may keep it from learning; rounds have no `feed`."""
    report.rounds = 0 if cfg.rollout is None else cfg.rollout.rounds
    dataset = None if feed is None else feed.dataset
    evaluated = inputs.held_out_prompts if held_out is None else held_out.dataset
    report.say(run_plan(cfg, num_steps, len(inputs.prompts) if dataset is None else dataset.epoch_size))
    if cfg.eval.path is not None:
        report.say(evaluation_plan(cfg, num_steps, len(evaluated)))
    for doubt in doubts.before(num_steps, dataset, inputs.prompts, evaluated):
        report.warn(doubt)


def _run(job: Job) -> int:
    cfg = job.cfg
    job.report.begin(job.step)
    if job.step == 0 and evaluation_due(cfg, 0, job.num_steps):
        with during("evaluating before the first step", None):
            job.report.evaluation({"step": 0, **position(cfg, job.feed, 0), **_evaluate(job), "time": utc_now()})
    while job.step < job.num_steps:
        with during(f"step {job.step + 1}", job.step):
            _step(job)
        with during(f"after step {job.step}", job.step):
            stop, last = _why_stop(job), job.step == job.num_steps
            due = bool(cfg.checkpoint.every) and job.step % cfg.checkpoint.every == 0
            if due or (last and keeps_last(cfg)) or (stop and not last):
                save(job)
            if stop and not last:
                return _finish(job, STOPPED, stop)
            if cfg.export.every and job.step % cfg.export.every == 0 and not last and (problem := export_model(job)):
                job.report.say(f"{problem}; training goes on")
    problem = ""
    if cfg.export.hf_dir is not None:
        with during("exporting", job.step):
            problem = export_model(job)
    if problem:
        return _finish(job, FAILED, keep_instead(job, problem))
    seconds = time.perf_counter() - job.started
    report_summary(job.report, cfg, step=job.step, begun_at=job.begun_at, seconds=seconds)
    return _finish(job, DONE, "done")


def _step(job: Job) -> None:
    """Run one optimizer step and report it."""
    cfg, batch = job.cfg, _next_batch(job)
    began = time.perf_counter()
    result, norm = _take_step(job, batch)
    seconds = time.perf_counter() - began
    job.step += 1
    if result.pass_mode not in job.modes:
        job.modes.add(result.pass_mode)
        job.report.say(f"step {job.step}: {result.pass_mode.replace('_', ' ')}: {PASS_MODES[result.pass_mode]}")
    rate = learning_rate(cfg.optimizer, job.step, job.num_steps)
    record = {
        "step": job.step,
        **position(cfg, job.feed, job.step),
        **step_metrics(job.engine, batch, result, rate=rate, norm=norm, seconds=seconds),
        **job.feed.stats(job.step - 1),
    }
    if job.step in cfg.run.dump_steps and job.world.is_main:
        dump_step(job.run_dir, job.step, batch, result)
    for doubt in job.doubts.of_step(job.step, batch, norm):
        job.report.warn(doubt)
    if evaluation_due(cfg, job.step, job.num_steps):
        record.update(_evaluate(job))
    job.report.step({**record, "time": utc_now()})


def _next_batch(job: Job) -> StepBatch:
    """The next step's batch; of a round that begins with it, what was sampled is reported."""
    rollout, feed = job.cfg.rollout, job.feed
    if rollout is None or not isinstance(feed, RoundFeed) or job.step % rollout.updates_per_round:
        return feed.batch(job.step)
    number = job.step // rollout.updates_per_round + 1
    job.report.doing(f"sampling round {number}")
    batch = feed.batch(job.step)
    job.report.doing("training")
    report_round(job.report, number, rollout.rounds, feed.records, feed.stats(job.step), feed.inputs.tokenizer)
    for doubt in job.doubts.of_round(number, feed.records, feed.stats(job.step)):
        job.report.warn(doubt)
    return batch


def _take_step(job: Job, batch: StepBatch) -> tuple[StepResult, float]:
    """Gradient, checks, update."""
    cfg = job.cfg
    result = accumulate(job.engine, batch, cfg.loss, cutting=cutting_of(cfg))
    limit = cfg.run.max_pass_gap
    allowed = AUTO_PASS_GAP[cfg.run.dtype] if limit == "auto" else float(limit)
    finite = math.isfinite(result.loss)  # else the gap is as undefined as the loss, and counts as that bad step
    if finite and result.pass_gap is not None and not result.pass_gap <= allowed:
        raise RuntimeError(
            f"the two passes differ by {result.pass_gap:.3g} in a token's log-prob, above run.max_pass_gap {allowed:g}"
        )
    rate = learning_rate(cfg.optimizer, job.step + 1, job.num_steps)
    norm = job.engine.update(rate, clip_norm=cfg.optimizer.clip_norm) if finite else None
    if norm is None or not math.isfinite(norm):
        job.bad_steps += 1
        told = f"loss {result.loss}, gradient norm {norm}"
        if job.bad_steps > cfg.run.max_bad_steps:
            raise RuntimeError(f"{told}; bad steps {job.bad_steps}, run.max_bad_steps {cfg.run.max_bad_steps}")
        job.report.say(
            f"step {job.step + 1}: {told}; skipped, {job.bad_steps} of run.max_bad_steps {cfg.run.max_bad_steps}"
        )
    return result, math.nan if norm is None else norm


def _evaluate(job: Job) -> dict[str, float]:
    job.report.doing("evaluating")
    held_out = job.inputs.held_out_prompts if job.held_out is None else job.held_out
    return held_out_metrics(job.cfg, job.engine, job.feed, held_out)


@contextmanager
def _signals(job: Job) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGUSR1 ask for a stop after the step in progress."""

    def note(number: int, frame: FrameType | None) -> None:
        job.signalled = signal.Signals(number).name

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield
    except BaseException:
        if job.world.size > 1:
            # The launcher signals every rank once one has failed; this one's own message must come out first.
            before = [signal.SIG_IGN for _ in numbers]
        raise
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _why_stop(job: Job) -> str:
    """Why all ranks stop here, or nothing: any rank's signal counts, and rank 0's clock."""
    minutes = (time.perf_counter() - job.started) / 60
    late = job.world.is_main and job.cfg.run.max_minutes is not None and minutes >= job.cfg.run.max_minutes
    asked = job.engine.max_over_job(2.0 if job.signalled else 1.0 if late else 0.0)
    if asked == 0.0:
        return ""
    return f"stopped by {job.signalled or 'a signal to another rank'}" if asked == 2.0 else "run.max_minutes is over"


def _finish(job: Job, code: int, reason: str) -> int:
    if job.world.is_main:
        write_status(job.run_dir, code, reason, job.step)
    more = f" of {job.num_steps}; the same command goes on from there" if code == STOPPED else ""
    job.report.say(f"{reason} after step {job.step}{more}")
    dist.barrier()  # a launcher ends all ranks once one has ended with a code; rank 0 has told by then
    return code
