"""Holds the state of a running job, and exports and resumes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megalign.config.job import JobConfig
from megalign.engines.build import lora_of
from megalign.engines.export import ExportFailed, export
from megalign.engines.protocol import Engine
from megalign.runtime.distributed import World
from megalign.runtime.heart import Counts, Heart
from megalign.runtime.status import during
from megalign.runtime.stop import Stop
from megalign.runtime.versions import versions
from megalign.train.cannot_learn import Doubts
from megalign.train.cut_back import keep_metrics_up_to, later_dumps
from megalign.train.evaluation import Evaluation
from megalign.train.feeds import Feed
from megalign.train.inputs import Inputs
from megalign.train.outputs import Start
from megalign.train.reporter import Reporter
from megalign.train.round_file import read_round
from megalign.train.schedule import resume_lines, save_every
from megalign.train.time_limit import TimeLimit


@dataclass
class Job:
    """Holds what the loop needs between steps."""

    cfg: JobConfig
    inputs: Inputs
    start: Start
    world: World
    engine: Engine
    feed: Feed
    evaluation: Evaluation | None
    num_steps: int
    report: Reporter
    doubts: Doubts
    began: float  # time.perf_counter() at the job's start
    step: int = 0  # steps finished
    saved: Path | None = None  # the checkpoint of this run that holds `step`
    begun_at: int = 0  # steps finished before this start
    bad_steps: int = 0
    stop: Stop = field(default_factory=Stop)
    heart: Heart = field(default_factory=Heart)
    modes: set[str] = field(default_factory=set)  # the pass modes that the log has named
    limit: TimeLimit = field(default_factory=TimeLimit)
    pending: Any = None  # the checkpoint that is written beside training
    damaged: set[Path] = field(default_factory=set)  # checkpoints of the run that were found so, and not saved anew
    unsaved: str = ""  # why the newest checkpoint could not be saved
    save_times: dict[str, float] = field(default_factory=dict)  # metrics of what was saved since the last step's line

    @property
    def run_dir(self) -> Path:
        """Return the directory that the run writes to."""
        return Path(self.cfg.run.dir)

    @property
    def holds_step(self) -> bool:
        """Tell whether the newest checkpoint of this run holds the step that is done."""
        return self.saved is not None and self.saved.name.endswith(f"{self.step:08d}")

    @cached_property
    def versions(self) -> dict[str, str]:
        """Return the versions of what computes numbers in this process."""
        return versions()

    @property
    def save_every(self) -> int:
        """Return the number of steps between checkpoints; 0 for none."""
        return save_every(self.cfg, self.num_steps)


@contextmanager
def phase(job: Job, doing: str, *, counts: Counts = "beats") -> Iterator[None]:
    """Name what the job does inside the block, to the watchdog and to who reads of an error in it."""
    with job.heart.during(doing, job.step, counts=counts), during(doing, job.step):
        yield


def export_model(job: Job) -> str:
    """Export the model under the live weights; return one line on every rank if that failed, else ""."""
    folder = Path(str(job.cfg.export.hf_dir))
    lora, base = lora_of(job.cfg), job.cfg.model.path
    inputs, owner = job.inputs, job.start.owner
    try:
        beside = export(job.engine, inputs.policy, folder, owner=owner, lora=lora, base=base)
    except ExportFailed as error:
        return f"the export to {folder} failed: {error}"
    how = f" in {str(job.engine.dtype).removeprefix('torch.')}"
    how += "" if lora is None else ", adapters merged"
    how += " and in its folder adapter" if beside else ""
    alone = lora is not None and not beside
    job.report.say(f"exported {folder}{how}" + (" (PEFT has no place for single experts' adapters)" if alone else ""))
    return ""


def resume(job: Job) -> None:
    """Load the checkpoint to resume from, if any; drop metrics and dumps of steps that are still to be taken."""
    start, checkpoint = job.start, job.start.checkpoint
    job.damaged = set(start.damaged)
    if checkpoint is not None:
        extra = job.engine.load(checkpoint)
        job.step, job.bad_steps = extra["step"], extra["bad_steps"]
        job.begun_at, job.saved = job.step, checkpoint if start.own else None
        job.report.say(f"resumed from {checkpoint} after step {job.step}")
        if all(key.startswith("optimizer.") for key in start.changed):
            job.feed.restore(read_round(checkpoint, extra))
        elif job.cfg.rollout is not None:
            job.report.say("the round in progress is sampled anew, because its settings have changed")
        for line in resume_lines(job.cfg, job.step, job.num_steps, start.num_steps_before):
            job.report.say(line)
    if job.world.is_main:
        _cut_back(job)


def _cut_back(job: Job) -> None:
    """Drop what the run directory holds of steps after the job's; the log names the steps."""
    dumps = later_dumps(job.run_dir, job.step)
    again = {"metrics.jsonl: the lines": keep_metrics_up_to(job.run_dir, job.step)}
    again["steps: the files"] = [int(path.stem.removeprefix("step_")) for path in dumps]
    for path in dumps:
        path.unlink()
    for what, steps in again.items():
        if steps:
            job.report.say(f"{what} of steps {steps[0]} to {steps[-1]} are dropped; these steps are taken again")
