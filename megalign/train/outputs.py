"""Checks what training starts from and where it writes, in one process, before a model is built."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from megalign.config.job import JobConfig, load_config
from megalign.convert.hf.export_dir import Owner, check_target, is_export
from megalign.convert.hf.model import HFModel
from megalign.convert.hf.writer import specs_of
from megalign.engines.build import dtype_of, engine_package, lora_of
from megalign.schema import UserError
from megalign.train.checkpoint_facts import Facts, read_facts, read_plain
from megalign.train.checkpoint_files import check_whole
from megalign.train.fingerprint import Difference, describe, differences, is_allowed, job_digest, settings
from megalign.train.inputs import Inputs
from megalign.train.resume_point import NONE, ResumePoint, find_checkpoint, newer_than
from megalign.train.run_dir import check_config_file, check_run_dir, holds_own, is_inside, nearest, probe
from megalign.train.schedule import keeps_last


@dataclass(frozen=True, slots=True)
class Start:
    """Describes the state that training starts from.

    checkpoint: a run's, with optimizer and position. weights: a converted checkpoint, whose weights replace those of
    model.path. own: `checkpoint` is in this run directory. rolled_back: newer checkpoints of the run lie beside it.
    changed: keys in which the job differs, as checkpoint.allow permits, from the one that saved the checkpoint.
    """

    job: dict[str, Any]
    owner: Owner
    checkpoint: Path | None = None
    weights: Path | None = None
    own: bool = False
    rolled_back: bool = False
    changed: tuple[str, ...] = ()
    started_from: str | None = None
    num_steps_before: int | None = None
    step: int = 0  # that the checkpoint is after; 0 where it does not say, or there is none
    notes: tuple[str, ...] = ()  # for the log
    damaged: frozenset[Path] = frozenset()  # checkpoints whose contents are not what was written


def job_date(cfg: JobConfig) -> str:
    """Return the date that chat templates see as today's: data.date, else the resumed run's, else today's."""
    if cfg.data.date is not None:
        return cfg.data.date
    point = find_checkpoint(Path(cfg.run.dir), cfg.checkpoint.resume)
    about = None if point is None else read_plain(point.folder)
    saved = None if about is None else about["job"]["data"].get("date")
    if saved is None and cfg.checkpoint.resume != "never":
        saved = _date_of_same(cfg)
    return str(saved) if saved is not None else date.today().isoformat()


def _date_of_same(cfg: JobConfig) -> str | None:
    """Return the date of an earlier run in the directory, with the same settings, that saved no checkpoint."""
    try:
        before = load_config(str(Path(cfg.run.dir) / "config.yaml"))
    except UserError:
        return None
    return before.data.date if settings(with_date(before, None)) == settings(cfg) else None


def with_date(cfg: JobConfig, day: str | None) -> JobConfig:
    """Return the configuration with `data.date` set."""
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"date": day})})


def check_outputs(cfg: JobConfig, inputs: Inputs, damaged: Mapping[Path, str] = NONE) -> Start:
    """Refuse checkpoints that training cannot resume from, and a run.dir or export.hf_dir that it cannot write to.

    damaged: as in `find_checkpoint`.
    """
    start = _find_start(cfg, inputs, damaged)
    check_run_dir(Path(cfg.run.dir))
    check_config_file(Path(cfg.run.dir))
    if cfg.export.hf_dir is not None:
        _check_export(cfg, inputs, start)
    _check_room(cfg, inputs, start)
    return start


def _find_start(cfg: JobConfig, inputs: Inputs, damaged: Mapping[Path, str]) -> Start:
    point = find_checkpoint(Path(cfg.run.dir), cfg.checkpoint.resume, damaged)
    weights, notes = None, () if point is None else point.notes
    if point is not None:
        check_whole(point.folder, inputs.policy)
        facts = read_facts(point.folder)
        _check_engine(cfg, point.folder, facts)
        if not facts.optimizer:
            weights, point = point.folder, None
        elif point.since and point.named is not None and _began_converted(point.folder):
            weights = _converted(point.named, inputs)
    job = describe(cfg, inputs, weights)
    owner = Owner(os.path.realpath(cfg.run.dir), job_digest(job))
    if point is None:
        named = None if weights is None else os.path.realpath(cfg.checkpoint.resume)
        return Start(job, owner, weights=weights, started_from=named, notes=notes)
    return _go_on(cfg, point, Start(job, replace(owner, resumed=point.own), point.folder, weights, own=point.own))


def _check_engine(cfg: JobConfig, checkpoint: Path, facts: Facts) -> None:
    """Refuse a checkpoint of another engine, or of a run with other adapters; a converted one may get any adapters."""
    if facts.engine != cfg.engine.name:
        raise UserError(
            f"{checkpoint} was saved by engine {facts.engine}; must be one of engine.name {cfg.engine.name}; an export "
            "of that run can be model.path"
        )
    saved = facts.adapters
    if saved != lora_of(cfg) and (saved is not None or facts.optimizer):
        was = "without adapters" if saved is None else f"with rank {saved.rank}, alpha {saved.alpha:g}, targets "
        was += "" if saved is None else ", ".join(saved.targets)
        raise UserError(
            f"{checkpoint} was trained {was}; lora must be the same, or model.path an export of that run; "
            "to begin anew, another run.dir or checkpoint.resume=never"
        )


def _began_converted(folder: Path) -> bool:
    """Tell whether a run's checkpoint may come from one that began with converted weights; else those are not read."""
    saved = read_plain(folder)
    about = None if saved is None or saved["job"] is None else saved["job"].get("checkpoint")
    return about is None or about.get("resume") is not None


def _converted(named: Path, inputs: Inputs) -> Path | None:
    """Return the converted checkpoint that a run began with, if any: the reference still has its weights."""
    start = find_checkpoint(named / "no run", str(named))
    if start is None or read_facts(start.folder).optimizer:
        return None
    check_whole(start.folder, inputs.policy)
    return start.folder


def _go_on(cfg: JobConfig, point: ResumePoint, start: Start) -> Start:
    """Return the start with its checkpoint, after comparing the job with the one that saved it."""
    saved, notes = read_plain(point.folder), [*point.notes]
    if point.since:
        notes.append(
            f"this run has saved {point.folder.name} since it started from {point.named}, and goes on from there; to "
            "start from it once more give another run.dir"
        )
    named = None if point.named is None else os.path.realpath(point.named)
    returns = point.own and point.named is not None and not point.since
    newer = newer_than(point.folder) if returns else []
    # One that is named itself is a start of its own even where nothing is newer: a restart must find it so.
    goes_on = point.own and not (returns and named == os.path.realpath(point.folder)) and not newer
    if saved is None:
        notes.append(f"{point.folder} does not say which job saved it, so this is not checked")
        return replace(start, rolled_back=bool(newer), started_from=None if goes_on else named, notes=tuple(notes))
    was, now = saved["job"], start.job
    if start.weights is None and not _uses_initial(cfg):
        now = now | {"checkpoint": was.get("checkpoint")}
    changes = differences(was, now)
    refused = [difference for difference in changes if not is_allowed(difference, cfg.checkpoint.allow)]
    if refused:
        raise UserError(_other_job(cfg, point, changes, refused))
    notes += [f"checkpoint.allow: {difference}" for difference in changes]
    return replace(
        start,
        job=now,
        rolled_back=bool(newer),
        changed=tuple(difference.key for difference in changes),
        started_from=saved.get("started_from") if goes_on else named,
        num_steps_before=saved.get("num_steps"),
        step=saved.get("step") or 0,
        notes=tuple(notes),
    )


def _uses_initial(cfg: JobConfig) -> bool:
    return cfg.loss.traits().reference and cfg.reference.source == "initial"


def _other_job(cfg: JobConfig, point: ResumePoint, changes: list[Difference], refused: list[Difference]) -> str:
    """Return one line: the keys that differ, with both values, and how to continue."""
    listed = "; ".join(map(str, refused))
    other = "another run.dir" if point.own else "another directory"
    if any(difference.key == "rollout" for difference in refused):
        allow = ""
    else:
        keys = ", ".join(difference.key for difference in changes)
        allow = f"; to go on with the changes, checkpoint.allow=[{keys}]"
    anew = f"to begin anew, {other} or checkpoint.resume=never"
    return f"{point.folder} is another job's: {listed}; must be this job's; {anew}{allow}"


def _check_export(cfg: JobConfig, inputs: Inputs, start: Start) -> None:
    """Refuse an export that would fail, or would replace files that are not this run's."""
    target, run_dir = Path(str(cfg.export.hf_dir)), Path(cfg.run.dir)
    shown = f"export.hf_dir is {cfg.export.hf_dir!r}"
    if holds_own(run_dir, target):
        raise UserError(f"{shown}: the run's own files are there; must be another directory, such as {{run.dir}}/hf")
    read = {f"teachers.{index}.path": teacher.path for index, teacher in enumerate(cfg.teachers)}
    read["reference.source"] = cfg.reference.source or ""
    for field, path in read.items():
        if Path(path).expanduser().resolve() == target.resolve():
            raise UserError(f"{shown}: it is {field}; must be another directory")
    # An earlier run's export inside the run directory is kept aside with the rest of that run.
    moves = start.checkpoint is None or not start.own
    goes = moves and is_inside(target, run_dir) and is_export(target)
    try:
        check_target(target, inputs.policy.folder, overwrite=True, owner=None if goes else start.owner)
        probe(target)
    except UserError as error:
        raise UserError(f"{shown}: {error}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{shown}: it cannot be written ({reason}); must be a directory that can be made") from None


def _check_room(cfg: JobConfig, inputs: Inputs, start: Start) -> None:
    """Refuse a disk without space for an export and, in a new run, for one checkpoint."""
    needs: list[tuple[str, Path, int]] = []
    if start.checkpoint is None and keeps_last(cfg, cfg.run.steps):
        size = engine_package(cfg).checkpoint_bytes(cfg, inputs.policy)
        needs.append((f"run.dir is {cfg.run.dir!r}: a checkpoint", Path(cfg.run.dir), size))
    if cfg.export.hf_dir is not None:
        needs.append(
            (
                f"export.hf_dir is {cfg.export.hf_dir!r}: an export",
                Path(cfg.export.hf_dir),
                export_bytes(cfg, inputs.policy),
            )
        )
    taken: dict[int, int] = {}
    for what, folder, num_bytes in needs:
        above = nearest(folder)
        disk = os.stat(above).st_dev
        free = shutil.disk_usage(above).free - taken.get(disk, 0)
        if num_bytes > free:
            raise UserError(
                f"{what} takes {num_bytes / 1e6:,.2f} MB, {max(0, free) / 1e6:,.2f} MB are free there; must be a disk "
                "with room for it"
            )
        taken[disk] = taken.get(disk, 0) + num_bytes


def export_bytes(cfg: JobConfig, model: HFModel) -> int:
    """Return the size of an export's weights."""
    return sum(spec.num_bytes for spec in specs_of(model, dtype_of(cfg)).values())
