"""Runs training's own checks on rank 0, so that what `train` would refuse is found with the same line."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from megalign.config.job import JobConfig, scored_models
from megalign.convert.hf.reader import HUB_MODEL, cached_model
from megalign.doctor.finding import Finding
from megalign.doctor.layout import layout_refusal
from megalign.doctor.needed import model_of
from megalign.doctor.visit import Check, Visit
from megalign.rollout.guard import TimeIsUp, time_limit
from megalign.schema import UserError
from megalign.train.check import check
from megalign.train.inputs import Inputs
from megalign.train.outputs import check_outputs, job_date, with_date

READING_S = 18.0  # after which the rest of the records is left to the job itself
MOST_IDLE = 0.3  # share of a step in which a pipeline stage may wait for the others


def refusal_checks() -> list[Check]:
    """Return the check that runs the checks of `train` itself."""
    return [Check("training's checks", _run, _judge)]


def _run(visit: Visit) -> dict[str, Any]:
    """Read and check everything on rank 0; others do nothing."""
    cfg = visit.cfg
    if cfg is None or not visit.world.is_main:
        return {}
    models = [cfg.model.path, *scored_models(cfg).values()]
    missing = [path for path in models if HUB_MODEL.fullmatch(path) and cached_model(path) is None]
    if missing:
        return {"skipped": f"{missing[0]} would be downloaded first"}
    began = time.monotonic()
    result: dict[str, Any] = {"problem": ""}
    try:
        with time_limit(READING_S):
            cfg = with_date(cfg, job_date(cfg))
            inputs = check(cfg, visit.world.size)
            start = check_outputs(cfg, inputs)
            result |= {"notes": [*inputs.notes, *start.notes], **_of_a_step(cfg, inputs, visit.world.size)}
    except TimeIsUp:
        result["late"] = True
    except UserError as error:
        model = model_of(cfg)
        told = None if model is None else layout_refusal(cfg, model, visit.world.size)
        result = {"told": True} if str(error) == told else {"problem": str(error)}
    except SystemExit as error:
        result["problem"] = f"a module that the configuration names ended the checks by sys.exit({error.code!r})"
    return result | {"seconds": time.monotonic() - began}


def _of_a_step(cfg: JobConfig, inputs: Inputs, world_size: int) -> dict[str, Any]:
    """Return how many records there are, and how many micro-batches a data rank has in the first step."""
    if inputs.records is None:
        return {"records": len(inputs.prompts), "kind": "prompts"}
    dataset = inputs.records.dataset
    assert cfg.data.groups_per_step is not None
    items = dataset.step_items(0, groups_per_step=cfg.data.groups_per_step, shuffle=cfg.data.shuffle)
    lengths = [len(sequence) for sequence in dataset.sequences(items)[0]]
    parallel = cfg.parallel
    data = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    rows = sum(lengths) / cfg.data.tokens_per_micro_batch
    return {"records": len(dataset), "kind": "records", "micro-batches": math.ceil(rows / data)}


def _judge(visit: Visit, answers: Sequence[dict[str, Any]]) -> list[Finding]:
    cfg, result, check_name = visit.cfg, answers[0], "training's checks"
    if cfg is None:
        return []
    if "skipped" in result:
        return [Finding(check_name, "warn", f"not run: {result['skipped']}", "download it, then run the doctor again")]
    if result.get("told"):  # by the check of the layout
        return []
    seconds = f"{result['seconds']:.1f} s"
    if result["problem"]:
        return [Finding(check_name, "fail", result["problem"], "train would refuse it in this line")]
    if result.get("late"):
        line = f"nothing is wrong with what was read in {READING_S:g} s; the rest of the records was not read"
        return [Finding(check_name, "warn", line, f"python -m megalign.preflight --ranks {visit.world.size} reads all")]
    found = f"{result['records']} {result['kind']}, models and outputs are as they must be, in {seconds}"
    findings = [Finding(check_name, "ok", "; ".join([found, *result["notes"]]))]
    if "micro-batches" in result and cfg.parallel.pipeline > 1:
        findings.append(idle_finding(cfg, result["micro-batches"]))
    return findings


def idle_finding(cfg: JobConfig, num_micro_batches: float) -> Finding:
    """Say how long pipeline stages wait for each other (Megatron-LM, arXiv 2104.04473, section 2.2)."""
    stages, virtual = cfg.parallel.pipeline, cfg.parallel.virtual_pipeline
    waiting = (stages - 1) / virtual
    idle = waiting / (num_micro_batches + waiting)
    found = f"{num_micro_batches:.0f} micro-batches a step through {stages} stages: each waits {idle:.0%} of the time"
    if idle > MOST_IDLE:
        advice = "raise data.groups_per_step or parallel.virtual_pipeline, or lower data.tokens_per_micro_batch"
        return Finding("pipeline", "warn", f"{found}, more than {MOST_IDLE:.0%}", advice)
    return Finding("pipeline", "ok", found)
