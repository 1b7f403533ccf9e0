"""A job under way: what the loop holds between steps, and how that is saved, exported and found again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megalign.config import JobConfig
from megalign.engines.engine import Engine
from megalign.runtime.distributed import World
from megalign.runtime.status import during
from megalign.train.cannot_learn import Doubts
from megalign.train.check import Inputs
from megalign.train.checkpoint import save_checkpoint
from megalign.train.feeds import DatasetFeed, Feed
from megalign.train.outputs import Start
from megalign.train.report import Reporter, keep_metrics_up_to
from megalign.train.schedule import resume_lines
from megalign.train.session import ExportFailed, export, lora_of


@dataclass
class Job:
    """What the loop holds between steps."""

    cfg: JobConfig
    inputs: Inputs
    start: Start
    world: World
    engine: Engine
    feed: Feed
    num_steps: int
    report: Reporter
    held_out: DatasetFeed | None
    doubts: Doubts
    started: float  # time.perf_counter when the job began
    step: int = 0  # finished ones
    saved: Path | None = None  # the checkpoint of this run that holds `step`
    begun_at: int = 0  # those finished before this start
    bad_steps: int = 0
    signalled: str = ""
    modes: set[str] = field(default_factory=set)  # the pass modes that the log has named

    @property
    def run_dir(self) -> Path:
        return Path(self.cfg.run.dir)


def save(job: Job) -> Path:
    """Write a checkpoint of the step that is done."""
    extra = {"step": job.step, "bad_steps": job.bad_steps, "feed": job.feed.state()}
    start, keep = job.start, job.cfg.checkpoint
    job.saved = save_checkpoint(
        job.engine,
        job.run_dir,
        job.step,
        extra,
        about={"job": start.job, "num_steps": job.num_steps, "started_from": start.started_from},
        keep=keep.keep,
        keep_every=keep.keep_every,
        spare=start.started_from,
    )
    job.report.say(f"saved {job.saved}")
    return job.saved


def export_model(job: Job) -> str:
    """Write the model as it is now; the problem, if there was one, as a line on every rank."""
    folder = Path(str(job.cfg.export.hf_dir))
    lora, base = lora_of(job.cfg), job.cfg.model.path
    inputs, owner = job.inputs, job.start.owner
    try:
        beside = export(job.engine, inputs.model, inputs.hf_dir, folder, owner=owner, lora=lora, base=base)
    except ExportFailed as error:
        return f"the export to {folder} failed: {error}"
    how = "" if lora is None else ", adapters merged"
    how += " and in its folder adapter" if beside else ""
    alone = lora is not None and not beside
    job.report.say(f"exported {folder}{how}" + (" (PEFT has no place for single experts' adapters)" if alone else ""))
    return ""


def keep_instead(job: Job, problem: str) -> str:
    """Save the model that could not be exported; what to tell of it."""
    job.report.say(problem)
    with during(f"{problem}; saving a checkpoint instead", job.step):
        folder = save(job) if job.saved is None or not job.saved.name.endswith(f"{job.step:08d}") else job.saved
    return (
        f"{problem}; step {job.step} is kept in {folder}: python tools/megatron_to_hf.py {folder} OUT_HF_DIR "
        "exports it, or this command again"
    )


def resume(job: Job) -> None:
    """Go on from a checkpoint, or begin; metrics of steps to be taken (again) are dropped."""
    start, checkpoint = job.start, job.start.checkpoint
    if checkpoint is not None:
        extra = job.engine.load(checkpoint)
        job.step, job.bad_steps = extra["step"], extra["bad_steps"]
        job.begun_at, job.saved = job.step, checkpoint if start.own else None
        job.report.say(f"resumed from {checkpoint} after step {job.step}")
        if all(key.startswith("optimizer.") for key in start.changed):
            job.feed.restore(extra["feed"])
        elif job.cfg.rollout is not None:
            job.report.say("the round in progress is sampled anew, for what it was made with has changed")
        for line in resume_lines(job.cfg, job.step, job.num_steps, start.num_steps_before):
            job.report.say(line)
    if job.world.is_main:
        again = keep_metrics_up_to(job.run_dir, job.step)
        if again:
            job.report.say(f"metrics.jsonl: the lines of steps {again[0]} to {again[-1]} are dropped; they come again")
