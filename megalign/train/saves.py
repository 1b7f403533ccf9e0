"""Saves a running job, at once or beside training, and reports what that took or why it failed."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread

from megalign.config.job import dump_config
from megalign.engines.build import lora_of
from megalign.engines.saving import Saving, Written
from megalign.runtime.command_line import program
from megalign.runtime.ranks import on_every_rank
from megalign.runtime.status import during
from megalign.schema import UserError
from megalign.train.checkpoint import Target, begin, finish, remove, removed_on_failure
from megalign.train.checkpoint_facts import Facts
from megalign.train.job import Job


@dataclass
class Pending:
    """Holds a checkpoint that a thread of each rank writes beside training."""

    target: Target
    saving: Saving
    written: Future[Written]
    began: float
    stall: float  # seconds that training has waited for it so far


def save(job: Job, *, last: bool = False) -> str:
    """Save the step that is done; return "", or on every rank one line that says why it could not be saved.

    With `checkpoint.async` the files are written beside training and a failure is reported later; not so for the
    `last` checkpoint of this process, after which nothing trains.
    """
    settle(job, wait=True)
    if job.holds_step:
        return ""
    copied, began = job.cfg.checkpoint.async_save and not last, time.perf_counter()
    target = _target(job)
    try:
        on_every_rank(job.report.keep)
        with removed_on_failure(target):
            saving = begin(job.engine, target, {"step": job.step, "bad_steps": job.bad_steps}, copied=copied)
            stays = [] if copied else finish(target, saving, saving.write)
    except UserError as error:
        return _failed(job, target, error, last=last)
    stall = time.perf_counter() - began
    if copied:
        job.pending = Pending(target, saving, _in_thread(saving), began, stall)
    else:
        _done(job, target, stays, seconds=stall, stall=stall)
    return ""


def settle(job: Job, *, wait: bool) -> None:
    """Complete the checkpoint that is written beside training, if all ranks have written theirs, or `wait` for them.

    Called on every rank at the same step.
    """
    pending: Pending | None = job.pending
    if pending is None or (not wait and job.engine.max_over_job(float(not pending.written.done()))):
        return
    job.pending, began = None, time.perf_counter()
    try:
        with removed_on_failure(pending.target):
            stays = finish(pending.target, pending.saving, pending.written.result)
    except UserError as error:
        _failed(job, pending.target, error, last=False)
        return
    now = time.perf_counter()
    _done(job, pending.target, stays, seconds=now - pending.began, stall=pending.stall + now - began)


def _in_thread(saving: Saving) -> Future[Written]:
    """Write this rank's files in a thread that does not outlive the process."""
    written: Future[Written] = Future()

    def write() -> None:
        try:
            written.set_result(saving.write())
        except BaseException as error:  # raised where the result is asked for
            written.set_exception(error)

    Thread(target=write, name="checkpoint", daemon=True).start()
    return written


def _target(job: Job) -> Target:
    start, keep = job.start, job.cfg.checkpoint
    return Target(
        job.run_dir,
        job.step,
        Facts(
            job.cfg.engine.name,
            str(job.engine.dtype),
            optimizer=True,
            adapters=lora_of(job.cfg),
            base=job.cfg.model.path,
            job=start.job,
            num_steps=job.num_steps,
            started_from=start.started_from,
            step=job.step,
        ),
        keep=keep.keep,
        keep_every=keep.keep_every,
        spare=start.started_from,
        feed=job.feed.state() if job.world.is_main else {},
        config=dump_config(job.cfg),
        versions=job.versions if job.world.is_main else {},
        damaged=frozenset(job.damaged),
    )


def _done(job: Job, target: Target, stays: list[str], *, seconds: float, stall: float) -> None:
    """Note a complete checkpoint; the next step's metrics say what it took. stays: lines about what it did not drop."""
    job.saved, job.unsaved = target.final, ""
    job.damaged.discard(target.final)
    job.limit.saved(seconds)
    job.save_times = {"checkpoint_seconds": seconds, "checkpoint_stall_seconds": stall}
    beside = f" in {seconds:.1f} s, of which training waited {stall:.1f} s" if job.cfg.checkpoint.async_save else ""
    job.report.say(f"saved {target.final}{beside}")
    for line in stays:
        job.report.warn(line)


def _failed(job: Job, target: Target, error: UserError, *, last: bool) -> str:
    """Note and report that a checkpoint could not be saved; return that as a line."""
    job.unsaved = f"step {target.step} is not saved: {error}"
    kept = "there is none" if job.saved is None else f"the last good one is {job.saved}"
    after = "" if last else "; training goes on, and the next save tries again"
    job.report.warn(f"{job.unsaved}; {kept}{after}")
    return job.unsaved


def save_until_exported(job: Job) -> bool:
    """Complete what is written, and where `checkpoint.every` is not given, save the last step before it is exported.

    Return whether it is to be removed after the export. An export that fails or is killed then costs no training; where
    there is no room for it, the log says so and the export goes ahead.
    """
    settle(job, wait=True)
    if job.cfg.checkpoint.every is not None or job.save_every or job.holds_step:
        return False
    if save(job, last=True):
        job.unsaved = ""
        return False
    return True


def remove_exported(job: Job) -> None:
    """Remove the checkpoint that was only kept until the export was complete."""
    assert job.saved is not None
    removed, job.saved = job.saved, None
    if job.world.is_main:
        problem = remove(removed)
        if problem:
            job.report.warn(problem)
        else:
            job.report.say(f"removed {removed}, since the model is exported")


def keep_instead(job: Job, problem: str) -> str:
    """Save a checkpoint of the model that could not be exported; return the line that reports both."""
    job.report.say(problem)
    with during(f"{problem}; saving a checkpoint instead", job.step):
        if unsaved := save(job, last=True):
            return f"{problem}; {unsaved}"
    return (
        f"{problem}; step {job.step} is kept in {job.saved}: {program()} export {job.saved} OUT_HF_DIR "
        "exports it, and so does this command if run again"
    )
