"""Acts on finished steps: hooks are functions that the loop calls in order after each step, on every rank.

Log and trackers, which must be closed, belong to the reporter, a context manager; hooks have nothing to close.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megalign.engines.replicas import first_difference
from megalign.engines.step import StepBatch, StepResult
from megalign.runtime.ranks import gather
from megalign.train.evaluation import evaluation_due
from megalign.train.job import Job, export_model, phase
from megalign.train.saves import save, settle
from megalign.train.schedule import keeps_last
from megalign.train.step_metrics import dump_step

PASS_MODES = {
    "two_pass": "the whole batch's log-probs first, then forward and backward",
    "single_pass": "forward and backward at once",
    "known_scores": "the log-probs are already there, so forward and backward at once",
}


@dataclass
class StepDone:
    """Holds a finished step; hooks may add to its metrics until `write_metrics` writes them."""

    batch: StepBatch
    result: StepResult
    norm: float  # of the gradient; NaN where the step was skipped
    metrics: dict[str, Any]


Hook = Callable[[Job, StepDone], None]


def name_pass_mode(job: Job, done: StepDone) -> None:
    """Log how the step computed its gradient, once for each pass mode."""
    mode = done.result.pass_mode
    if mode not in job.modes:
        job.modes.add(mode)
        job.report.say(f"step {job.step}: {mode.replace('_', ' ')}: {PASS_MODES[mode]}")


def dump(job: Job, done: StepDone) -> None:
    """Write the sequences of the steps in `run.dump_steps`."""
    if job.step in job.cfg.run.dump_steps and job.world.is_main:
        dump_step(job.run_dir, job.step, done.batch, done.result)


def warn(job: Job, done: StepDone) -> None:
    """Warn of what keeps the run from learning."""
    for doubt in job.doubts.of_step(job.step, done.batch, done.norm):
        job.report.warn(doubt)


def evaluate(job: Job, done: StepDone) -> None:
    """Add the held-out data's metrics when they are due."""
    if evaluation_due(job.cfg, job.step, job.num_steps):
        done.metrics.update(evaluation_metrics(job))


def write_metrics(job: Job, done: StepDone) -> None:
    """Write and show the step's line of metrics; with it what saving took since the line before."""
    job.report.step(done.metrics | job.save_times)
    job.save_times = {}


def compare_ranks(job: Job, done: StepDone) -> None:
    """Raise RuntimeError where parameters differ that ranks hold alike, every `watchdog.check_every` steps.

    Before a checkpoint is written, which would keep one rank's copy of them.
    """
    every = job.cfg.watchdog.check_every
    if not every or job.step % every:
        return
    problem = first_difference(job.engine.replicas(), device=job.engine.device)
    if job.engine.max_over_job(float(bool(problem))):
        raise RuntimeError(next(filter(None, gather(problem))))


def save_if_due(job: Job, done: StepDone) -> None:
    """Save a checkpoint every so many steps, and after the last where nothing else would keep the model."""
    settle(job, wait=False)
    every, is_last = job.save_every, job.step == job.num_steps
    if (every and job.step % every == 0) or (is_last and keeps_last(job.cfg, job.num_steps)):
        with phase(job, f"saving step {job.step}", counts="bytes"):
            save(job, last=is_last)


def export_if_due(job: Job, done: StepDone) -> None:
    """Export the model every `export.every` steps; after the last the loop exports itself."""
    every = job.cfg.export.every
    if not every or job.step % every or job.step >= job.num_steps:
        return
    with phase(job, f"exporting step {job.step}", counts="bytes"):
        problem = export_model(job)
    if problem:
        job.report.say(f"{problem}; training goes on")


# Errors in STEP_HOOKS are reported as the step's; SAVE_HOOKS run after the step, unless the run stops there.
STEP_HOOKS: tuple[Hook, ...] = (name_pass_mode, dump, warn, evaluate, write_metrics)
SAVE_HOOKS: tuple[Hook, ...] = (compare_ranks, save_if_due, export_if_due)


def evaluation_metrics(job: Job) -> dict[str, float]:
    """Evaluate the held-out data under the live weights: metrics `eval_...` and `eval_seconds`."""
    assert job.evaluation is not None
    job.report.doing("evaluating")
    began = time.perf_counter()
    with phase(job, f"evaluating after step {job.step}"):
        return {**job.evaluation(), "eval_seconds": time.perf_counter() - began}
