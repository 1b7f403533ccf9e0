"""Runs the command `train`: read and check everything, prepare, take the steps, save, export.

Run: python -m megalign train CONFIG.yaml [key.sub=value ...]
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from megalign.config.job import JobConfig
from megalign.engines.build import engine_package, packing_of
from megalign.engines.step import StepBatch, StepResult, accumulate
from megalign.runtime.discovery import allocation_end
from megalign.runtime.distributed import World, make_deterministic
from megalign.runtime.exit_codes import DONE, FAILED, STOPPED
from megalign.runtime.ranks import barrier, gather, on_every_rank
from megalign.runtime.status import Ending, write_status
from megalign.train.alike import check_alike, rank_items
from megalign.train.bad_steps import naming_records, skip
from megalign.train.check import check
from megalign.train.evaluation import evaluation_due
from megalign.train.hooks import SAVE_HOOKS, STEP_HOOKS, StepDone, evaluation_metrics
from megalign.train.inputs import Inputs
from megalign.train.job import Job, export_model, phase, resume
from megalign.train.outputs import Start, job_date, with_date
from megalign.train.prepare import Engines, prepare
from megalign.train.reporter import Reporter, start_log
from megalign.train.round_report import report_round
from megalign.train.rounds import RoundFeed
from megalign.train.run_dir import alone_in, open_run_dir
from megalign.train.saves import keep_instead, remove_exported, save, save_until_exported
from megalign.train.schedule import learning_rate
from megalign.train.starting import agree_on_start
from megalign.train.step_metrics import step_metrics
from megalign.train.stopping import leave_if_asked, signalled, unless_stopped_early
from megalign.train.summary import report_summary
from megalign.train.time_limit import TimeLimit

# Largest difference of a step's two passes in a token's log-prob: rounding of non-deterministic kernels.
AUTO_PASS_GAP = {"fp32": 1e-3, "bf16": 0.1}
PATIENCE_S = 30.0  # for a job that is ending to leave the run directory


def train(cfg: JobConfig, world: World, ending: Ending) -> int:
    """Run the job to its end; exit code 0, or 75 when it stopped early after saving. Called on every rank."""
    ending.stop.wait_for_step()
    if cfg.run.deterministic:
        make_deterministic()
    with ExitStack() as held:
        return unless_stopped_early(lambda: _train(cfg, world, ending, held), world, ending)


def _train(cfg: JobConfig, world: World, ending: Ending, held: ExitStack) -> int:
    """Prepare the job and run it; StoppedEarly on every rank where a signal stops it before its first step.

    held: until it ends, the run directory is this job's alone.
    """
    run_dir, began = Path(cfg.run.dir), time.perf_counter()
    # All ranks use rank 0's day, and a resumed run the day on which it began.
    cfg = with_date(cfg, gather(on_every_rank(lambda: job_date(cfg) if world.is_main else None))[0])
    inputs = on_every_rank(lambda: _read(cfg, world, ending))
    if world.size > 1:
        with ending.heart.during("digesting the inputs", counts="work"):
            items = rank_items(cfg, inputs)
        check_alike(cfg, items)
    with ending.heart.during("looking for what to start from", counts="bytes"):
        # Before the look: a job that is about to end may still save. A directory that is not there is nobody's.
        there = world.is_main and run_dir.is_dir()
        on_every_rank(lambda: held.enter_context(alone_in(run_dir, patience_s=PATIENCE_S)) if there else None)
        start = agree_on_start(cfg, inputs, world)
    leave_if_asked(ending.stop, world)
    on_every_rank(lambda: held.enter_context(alone_in(run_dir, patience_s=0)) if world.is_main and not there else None)
    kept = on_every_rank(lambda: _open_run_dir(cfg, start) if world.is_main else [])
    ending.take_over()
    start_log(run_dir, main=world.is_main)
    with ending.heart.during("connecting the ranks", counts="bytes"):  # and importing the engine
        connection = engine_package(cfg).connect(cfg, world)
    engines = Engines(cfg, inputs, start, connection, world)
    # `prepare` sets the total when the data are known, after the teachers have scored.
    leave = partial(leave_if_asked, ending.stop, world)
    with Reporter(run_dir, 0, main=world.is_main, trackers=cfg.trackers, between=leave) as report:
        for line in (*kept, *start.notes):
            report.say(line)
        if not cfg.checkpoint.every and cfg.export.hf_dir is None:
            report.say(
                "neither checkpoint.every nor export.hf_dir is set: a checkpoint after the last step keeps the model"
            )
        with ending.during("before the first step", None, counts="bytes"):
            job = prepare(engines, report, began=began)
        job.limit, job.stop, job.heart = TimeLimit(allocation_end()), ending.stop, ending.heart
        leave()
        with ending.during(f"loading {start.checkpoint}", None, counts="bytes"):
            resume(job)
        if job.step < job.num_steps:
            leave()
        return _run(job, ending)


def _read(cfg: JobConfig, world: World, ending: Ending) -> Inputs:
    """Read and check all inputs; this rank waits for no other meanwhile."""
    with ending.heart.during("reading the inputs", counts="work"):
        return check(cfg, world.size)


def _open_run_dir(cfg: JobConfig, start: Start) -> list[str]:
    sources = [source.path for source in cfg.data.sources or ()] + [cfg.data.path, cfg.eval.path]
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


def _run(job: Job, ending: Ending) -> int:
    """Take the steps, then export; return the exit code."""
    cfg = job.cfg
    if line := job.limit.begin():
        job.report.say(line)
    job.report.begin(job.step)
    if job.step == 0 and evaluation_due(cfg, 0, job.num_steps):
        with ending.during("evaluating before the first step", None):
            job.report.evaluation({"step": 0, **job.feed.position(0), **evaluation_metrics(job)})
    while job.step < job.num_steps:
        with ending.during(f"step {job.step + 1}", job.step):
            done = _step(job)
        with ending.during(f"after step {job.step}", job.step):
            stop = _why_stop(job)
            if stop and job.step < job.num_steps:
                return _stop(job, stop)
            for hook in SAVE_HOOKS:
                hook(job, done)
    if cfg.export.hf_dir is not None and (problem := _export(job, ending)):
        return _finish(job, FAILED, problem)
    if job.unsaved:
        return _finish(job, FAILED, job.unsaved)
    seconds = time.perf_counter() - job.began
    report_summary(job.report, cfg, step=job.step, begun_at=job.begun_at, seconds=seconds)
    return _finish(job, DONE, "done")


def _export(job: Job, ending: Ending) -> str:
    """Export the model, with a checkpoint of it on the disk meanwhile; return one line if that failed, else ""."""
    with ending.during(f"saving step {job.step}", job.step, counts="bytes"):
        kept_so_far = save_until_exported(job)
    with ending.during("exporting", job.step, counts="bytes"):
        problem = export_model(job)
    if problem:
        return keep_instead(job, problem)
    if kept_so_far:
        remove_exported(job)
    return ""


def _stop(job: Job, reason: str) -> int:
    """Save before the run's end; return the exit code."""
    with phase(job, f"saving step {job.step}", counts="bytes"):
        problem = save(job, last=True)
    return _finish(job, FAILED, f"{reason}, but {problem}") if problem else _finish(job, STOPPED, reason)


def _step(job: Job) -> StepDone:
    """Run one optimizer step and report its metrics."""
    batch = _next_batch(job)
    began = time.perf_counter()
    result, norm = _take_step(job, batch)
    seconds = time.perf_counter() - began
    job.step += 1
    rate = learning_rate(job.cfg.optimizer, job.step, job.num_steps)
    metrics = {
        "step": job.step,
        **job.feed.position(job.step),
        **step_metrics(job.engine, batch, result, rate=rate, norm=norm, seconds=seconds),
        **job.feed.stats(job.step - 1),
    }
    done = StepDone(batch, result, norm, metrics)
    for hook in STEP_HOOKS:
        hook(job, done)
    return done


def _next_batch(job: Job) -> StepBatch:
    """Return the next step's batch; if a round begins with it, report what was sampled."""
    feed = job.feed
    if not isinstance(feed, RoundFeed) or not feed.begins_round(job.step):
        return feed.batch(job.step)
    rollout = feed.rollout
    number = job.step // rollout.updates_per_round + 1
    job.report.doing(f"sampling round {number}")
    with phase(job, f"sampling round {number}"):
        batch = feed.batch(job.step)
    job.report.doing("training")
    report_round(job.report, number, rollout.rounds, feed.records, feed.stats(job.step), feed.tokenizer)
    for doubt in job.doubts.of_round(number, feed.records, feed.stats(job.step)):
        job.report.warn(doubt)
    return batch


def _take_step(job: Job, batch: StepBatch) -> tuple[StepResult, float]:
    """Compute the gradient, check it and update the weights; return the gradient's norm, NaN where it is skipped."""
    cfg = job.cfg
    with naming_records(job, batch):
        result = accumulate(job.engine, batch, cfg.loss, packing=packing_of(cfg))
    limit = cfg.run.max_pass_gap
    allowed = AUTO_PASS_GAP[cfg.run.dtype] if limit == "auto" else float(limit)
    finite = math.isfinite(result.loss)  # else the gap is undefined too, and the step is a bad step
    if finite and result.pass_gap is not None and not result.pass_gap <= allowed:
        raise RuntimeError(
            f"the two passes differ by {result.pass_gap:.3g} in a token's log-prob, above run.max_pass_gap {allowed:g}"
        )
    rate = learning_rate(cfg.optimizer, job.step + 1, job.num_steps)
    norm = job.engine.update(rate) if finite else None
    if norm is None or not math.isfinite(norm):
        skip(job, batch, result, f"loss {result.loss}, gradient norm {norm}")
    return result, math.nan if norm is None else norm


def _why_stop(job: Job) -> str:
    """Return why all ranks stop here, or "": a signal to any rank; run.max_minutes or Slurm's limit on rank 0."""
    minutes = (time.perf_counter() - job.began) / 60
    late = job.world.is_main and job.cfg.run.max_minutes is not None and minutes >= job.cfg.run.max_minutes
    near = job.limit.why_stop() if job.world.is_main else ""
    # In the order of their weight: one number is agreed on, and each rank has the words for it.
    reasons = ("", near or "rank 0 stops", "run.max_minutes is over", signalled(job.stop))
    mine = 3 if job.stop.asked else 2 if late else 1 if near else 0
    return reasons[int(job.engine.max_over_job(float(mine)))]


def _finish(job: Job, code: int, reason: str) -> int:
    """Write and log how the job ended; return `code`."""
    if job.world.is_main:
        write_status(job.run_dir, code, reason, job.step)
    more = f" of {job.num_steps}; the same command goes on from there" if code == STOPPED else ""
    job.report.say(f"{reason} after step {job.step}{more}")
    barrier()  # a launcher ends all ranks once one has ended; rank 0 must have written its status by then
    return code
