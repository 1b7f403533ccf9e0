"""The training loop: read everything, score what stays fixed, take the steps, save, export.

Run: python -m megalign train CONFIG.yaml [key.sub=value ...]
"""

from __future__ import annotations

import json
import math
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megalign.config import JobConfig, total_steps
from megalign.convert import ModelConfig
from megalign.convert.hf_config import noise_left_out
from megalign.engines.engine import Engine
from megalign.engines.groups import Groups
from megalign.engines.megatron import MegatronEngine
from megalign.engines.step import StepBatch, StepResult, accumulate, evaluate
from megalign.runtime.distributed import World, make_deterministic
from megalign.runtime.status import DONE, STOPPED, Ending, during, write_status
from megalign.train.check import Inputs, Records, check
from megalign.train.checkpoint import save_checkpoint
from megalign.train.feeds import DatasetFeed, Feed, with_teachers
from megalign.train.outputs import Start, check_outputs
from megalign.train.report import Reporter, keep_metrics_up_to, start_log
from megalign.train.rounds import RoundFeed, evaluate_reward, fixed_reference, live_sampler
from megalign.train.run_dir import open_run_dir
from megalign.train.schedule import keeps_last, learning_rate, resume_lines
from megalign.train.session import (
    ExportFailed,
    build_engine,
    cutting_of,
    export,
    gather,
    groups_of,
    layers_of,
    layout_text,
    lora_of,
    on_every_rank,
)

# Where the two passes of a step may differ by rounding of non-deterministic kernels and no more.
AUTO_PASS_GAP = {"fp32": 1e-3, "bf16": 0.1}


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
    started: float  # time.perf_counter when the job began
    step: int = 0  # finished ones
    saved: Path | None = None  # the checkpoint of this run that holds `step`
    bad_steps: int = 0
    signalled: str = ""
    modes: set[str] = field(default_factory=set)  # the pass modes that the log has named

    @property
    def run_dir(self) -> Path:
        return Path(self.cfg.run.dir)


def train(cfg: JobConfig, world: World, ending: Ending) -> int:
    """Run the job to its end; exit code 0, or 75 when it stopped early after saving. Called on every rank."""
    if cfg.run.deterministic:
        make_deterministic()
    run_dir, started = Path(cfg.run.dir), time.perf_counter()
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
                _resume(job)
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
    report.say(
        f"ranks {world.size}: {layout_text(groups)}; "
        f"{layers_of(cfg, inputs.model, world)} layers on {world.device.type}; {cfg.run.dtype}; loss {cfg.loss.name}"
    )
    if left_out := noise_left_out(inputs.hf_dir):
        report.say(left_out)
    for note in inputs.notes:
        report.say(note)

    def feed_of(records: Records, *, held_out: bool) -> DatasetFeed:
        report.say(records.dataset.report.line())
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
    return Job(cfg, inputs, start, world, engine, feed, num_steps, report, held_out, started)


def _resume(job: Job) -> None:
    """Go on from a checkpoint, or begin; metrics of steps to be taken (again) are dropped."""
    start, checkpoint = job.start, job.start.checkpoint
    if checkpoint is not None:
        extra = job.engine.load(checkpoint)
        job.step, job.bad_steps = extra["step"], extra["bad_steps"]
        job.saved = checkpoint if start.own else None
        job.report.say(f"resumed from {checkpoint} after step {job.step}")
        if all(key.startswith("optimizer.") for key in start.changed):
            job.feed.restore(extra["feed"])
        elif job.cfg.rollout is not None:
            job.report.say("the round in progress is sampled anew, for what it was made with has changed")
        for line in resume_lines(job.cfg, job.step, job.num_steps, start.num_steps_before):
            job.report.say(line)
    if job.world.is_main:
        keep_metrics_up_to(job.run_dir, job.step)


def _run(job: Job) -> int:
    cfg = job.cfg
    job.report.begin(job.step)
    while job.step < job.num_steps:
        with during(f"step {job.step + 1}", job.step):
            _step(job)
        with during(f"after step {job.step}", job.step):
            stop, last = _why_stop(job), job.step == job.num_steps
            due = bool(cfg.checkpoint.every) and job.step % cfg.checkpoint.every == 0
            if due or (last and keeps_last(cfg)) or (stop and not last):
                _save(job)
            if stop and not last:
                return _finish(job, STOPPED, stop)
            if cfg.export.every and job.step % cfg.export.every == 0 and not last and (problem := _export(job)):
                job.report.say(f"{problem}; training goes on")
    if cfg.export.hf_dir is not None:
        with during("exporting", job.step):
            problem = _export(job)
        if problem:
            return _finish(job, 1, _keep(job, problem))
    return _finish(job, DONE, "done")


def _step(job: Job) -> None:
    """One optimizer step with everything that is told of it."""
    cfg, batch = job.cfg, job.feed.batch(job.step)
    began = time.perf_counter()
    result, norm = _take_step(job, batch)
    seconds = time.perf_counter() - began
    job.step += 1
    if result.pass_mode not in job.modes:
        job.modes.add(result.pass_mode)
        job.report.say(f"step {job.step}: {result.pass_mode.replace('_', ' ')}")
    record = _record(job, batch, result, norm, seconds)
    if job.step in cfg.run.dump_steps and job.world.is_main:
        _dump(job, batch, result)
    if cfg.eval.every and job.step % cfg.eval.every == 0:
        record.update(_evaluate(job))
    job.report.step(record)


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


def _record(job: Job, batch: StepBatch, result: StepResult, norm: float, seconds: float) -> dict[str, Any]:
    tokens = sum(len(sequence) for sequence in batch.sequences)
    return {
        "step": job.step,
        "loss": result.loss,
        "grad_norm": norm,
        "lr": learning_rate(job.cfg.optimizer, job.step, job.num_steps),
        "tokens": tokens,
        "sequences": len(batch.sequences),
        "groups": batch.num_groups,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "padding_fraction": result.padding_fraction,
        "pass_mode": result.pass_mode,
        "pass_gap": result.pass_gap,
        "peak_memory_gb": job.engine.max_over_job(_peak_memory_gb(job.world.device)),
        **result.metrics,
        **job.feed.stats(job.step - 1),
    }


def _peak_memory_gb(device: torch.device) -> float:
    """Of the device's memory on CUDA, of this process's resident memory else; 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _evaluate(job: Job) -> dict[str, float]:
    if isinstance(job.feed, RoundFeed):
        return evaluate_reward(job.feed, job.inputs.held_out_prompts)
    assert job.held_out is not None
    result = evaluate(job.engine, job.held_out.whole(), job.cfg.loss, cutting=cutting_of(job.cfg))
    return {"eval_loss": result.loss, **{f"eval_{name}": value for name, value in result.metrics.items()}}


def _dump(job: Job, batch: StepBatch, result: StepResult) -> None:
    """`steps/step_<n>.jsonl`: one line a sequence that the step trained on."""
    folder = job.run_dir / "steps"
    folder.mkdir(exist_ok=True)
    with open(folder / f"step_{job.step}.jsonl", "w", encoding="utf-8") as file:
        for place, sequence in enumerate(batch.sequences):
            line = {
                "record": sequence.record,
                "group": sequence.group,
                "role": sequence.role,
                "prompt_ids": list(sequence.prompt_ids),
                "response_ids": list(sequence.response.ids),
                "logp": float(result.policy_S[place]),
                "reference_logp": None if batch.reference is None else batch.reference[place].total,
                "coefficient": float(result.coefficient_S[place]),
            }
            file.write(json.dumps(line) + "\n")


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


def _save(job: Job) -> Path:
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


def _export(job: Job) -> str:
    """Write the model as it is now; the problem, if there was one, as a line on every rank."""
    folder = Path(str(job.cfg.export.hf_dir))
    lora = lora_of(job.cfg)
    try:
        beside = export(job.engine, job.inputs.model, job.inputs.hf_dir, folder, owner=job.start.owner, lora=lora)
    except ExportFailed as error:
        return f"the export to {folder} failed: {error}"
    how = "" if lora is None else ", adapters merged"
    how += " and in its folder adapter" if beside else ""
    alone = lora is not None and not beside
    job.report.say(f"exported {folder}{how}" + (" (PEFT has no place for single experts' adapters)" if alone else ""))
    return ""


def _keep(job: Job, problem: str) -> str:
    """Save the model that could not be exported; what to tell of it."""
    job.report.say(problem)
    with during(f"{problem}; saving a checkpoint instead", job.step):
        folder = _save(job) if job.saved is None or not job.saved.name.endswith(f"{job.step:08d}") else job.saved
    return (
        f"{problem}; step {job.step} is kept in {folder}: python tools/megatron_to_hf.py {folder} OUT_HF_DIR "
        "exports it, or this command again"
    )


def _finish(job: Job, code: int, reason: str) -> int:
    if job.world.is_main:
        write_status(job.run_dir, code, reason, job.step)
    job.report.say(f"{reason} after step {job.step}")
    dist.barrier()  # a launcher ends all ranks once one has ended with a code; rank 0 has told by then
    return code
