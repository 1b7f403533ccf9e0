"""Where training starts from and what it writes to, checked before it starts by one process without a model."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from megalign.config import JobConfig, load_config
from megalign.convert.writer import Owner, check_target, is_export, model_specs
from megalign.engines.megatron_state import holds_optimizer
from megalign.schema import UserError
from megalign.train.check import Inputs, check_adapters
from megalign.train.checkpoint import Found, check_whole, find_checkpoint, newer_than, read_job
from megalign.train.fingerprint import Difference, describe, differences, is_allowed, job_digest, settings
from megalign.train.run_dir import check_config_file, check_run_dir, holds_own, is_inside, nearest, probe
from megalign.train.schedule import keeps_last
from megalign.train.session import dtype_of


@dataclass(frozen=True, slots=True)
class Start:
    """What training starts from.

    checkpoint: a run's, with optimizer and position. weights: a converted checkpoint, whose weights stand for those of
    model.path. own: `checkpoint` is one of this run directory's. rolled_back: newer ones of the same run are beside it.
    changed: keys in which the job differs from the one that saved the checkpoint, and is allowed to.
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
    notes: tuple[str, ...] = ()  # for the log


def job_date(cfg: JobConfig) -> str:
    """The day that chat templates get as today: data.date, else that of the run to go on with, else today."""
    if cfg.data.date is not None:
        return cfg.data.date
    found = find_checkpoint(Path(cfg.run.dir), cfg.checkpoint.resume)
    about = None if found is None else read_job(found.folder)
    saved = None if about is None else about["job"]["data"].get("date")
    if saved is None and cfg.checkpoint.resume != "never":
        saved = _date_of_same(cfg)
    return str(saved) if saved is not None else date.today().isoformat()


def _date_of_same(cfg: JobConfig) -> str | None:
    """The day of a run of the same settings in the directory, which was ended before it saved."""
    try:
        before = load_config(str(Path(cfg.run.dir) / "config.yaml"))
    except UserError:
        return None
    return before.data.date if settings(with_date(before, None)) == settings(cfg) else None


def with_date(cfg: JobConfig, day: str | None) -> JobConfig:
    """The configuration with `data.date` set."""
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"date": day})})


def check_outputs(cfg: JobConfig, inputs: Inputs) -> Start:
    """Refuse what training cannot go on from or write to: checkpoints, run.dir, export.hf_dir and their disks."""
    start = _find_start(cfg, inputs)
    check_run_dir(Path(cfg.run.dir))
    check_config_file(Path(cfg.run.dir))
    if cfg.export.hf_dir is not None:
        _check_export(cfg, inputs, start)
    _check_room(cfg, inputs, start)
    return start


def _find_start(cfg: JobConfig, inputs: Inputs) -> Start:
    found = find_checkpoint(Path(cfg.run.dir), cfg.checkpoint.resume)
    weights = None
    if found is not None:
        check_whole(found.folder, inputs.model)
        check_adapters(cfg, found.folder)
        if not holds_optimizer(found.folder):
            weights, found = found.folder, None
        elif found.since and found.named is not None:
            weights = _converted(found.named, inputs)
    job = describe(cfg, inputs, weights)
    owner = Owner(str(Path(cfg.run.dir).resolve()), job_digest(job))
    if found is None:
        named = None if weights is None else str(Path(cfg.checkpoint.resume).resolve())
        return Start(job, owner, weights=weights, started_from=named)
    return _go_on(cfg, found, Start(job, replace(owner, resumed=found.own), found.folder, weights, own=found.own))


def _converted(named: Path, inputs: Inputs) -> Path | None:
    """The converted checkpoint that a run began with, if it is one: its weights are still those of the reference."""
    again = find_checkpoint(named / "no run", str(named))
    if again is None or holds_optimizer(again.folder):
        return None
    check_whole(again.folder, inputs.model)
    return again.folder


def _go_on(cfg: JobConfig, found: Found, start: Start) -> Start:
    """Compare the job with the one that saved the checkpoint."""
    saved, notes = read_job(found.folder), []
    if found.since:
        notes.append(
            f"this run has saved {found.folder.name} since it started from {found.named}, and goes on from there; to "
            "start from it once more give another run.dir"
        )
    named = None if found.named is None else str(found.named.resolve())
    newer = newer_than(found.folder) if found.own and found.named is not None and not found.since else []
    goes_on = found.own and not newer
    if saved is None:
        notes.append(f"{found.folder} does not say which job saved it; that it was this one is not checked")
        return replace(start, rolled_back=bool(newer), started_from=None if goes_on else named, notes=tuple(notes))
    was, now = saved["job"], start.job
    if start.weights is None and not _uses_initial(cfg):
        now = now | {"checkpoint": was.get("checkpoint")}
    found_differences = differences(was, now)
    refused = [one for one in found_differences if not is_allowed(one, cfg.checkpoint.allow)]
    if refused:
        raise UserError(_other_job(cfg, found, found_differences, refused))
    notes += [f"checkpoint.allow: {one}" for one in found_differences]
    return replace(
        start,
        job=now,
        rolled_back=bool(newer),
        changed=tuple(one.key for one in found_differences),
        started_from=saved.get("started_from") if goes_on else named,
        num_steps_before=saved.get("num_steps"),
        notes=tuple(notes),
    )


def _uses_initial(cfg: JobConfig) -> bool:
    return cfg.loss.traits().reference and cfg.reference.source == "initial"


def _other_job(cfg: JobConfig, found: Found, all_found: list[Difference], refused: list[Difference]) -> str:
    """One line: the keys that differ, with both values, and the ways on."""
    told = "; ".join(map(str, refused))
    other = "another run.dir" if found.own else "another directory"
    if any(one.key == "rollout" for one in refused):
        allow = ""
    else:
        allow = f"; to go on with the changes, checkpoint.allow=[{', '.join(one.key for one in all_found)}]"
    anew = f"to begin anew, {other} or checkpoint.resume=never"
    return f"{found.folder} is another job's: {told}; must be this job's; {anew}{allow}"


def _check_export(cfg: JobConfig, inputs: Inputs, start: Start) -> None:
    """Refuse an export that must fail, or would replace what is not this run's."""
    target, run_dir = Path(str(cfg.export.hf_dir)), Path(cfg.run.dir)
    shown = f"export.hf_dir is {cfg.export.hf_dir!r}"
    if holds_own(run_dir, target):
        raise UserError(f"{shown}: the run's own files are there; must be another directory, such as {{run.dir}}/hf")
    read = {f"teachers.{place}.path": teacher.path for place, teacher in enumerate(cfg.teachers)}
    read["reference.source"] = cfg.reference.source or ""
    for field, path in read.items():
        if Path(path).expanduser().resolve() == target.resolve():
            raise UserError(f"{shown}: it is {field}; must be another directory")
    # An earlier run's export inside the run directory is kept aside with the rest of that run.
    moves = start.checkpoint is None or not start.own
    goes = moves and is_inside(target, run_dir) and is_export(target)
    try:
        check_target(target, inputs.hf_dir, overwrite=True, owner=None if goes else start.owner)
        probe(target)
    except UserError as error:
        raise UserError(f"{shown}: {error}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{shown}: it cannot be written ({reason}); must be a directory that can be made") from None


def _check_room(cfg: JobConfig, inputs: Inputs, start: Start) -> None:
    """Refuse a disk that has no room for an export and, in a new run, for one checkpoint."""
    needs: list[tuple[str, Path, int]] = []
    specs = model_specs(inputs.model, dtype_of(cfg)).values()
    size = sum(spec.num_bytes for spec in specs)
    if start.checkpoint is None and keeps_last(cfg):
        whole = size + _optimizer_bytes(cfg, specs)
        needs.append((f"run.dir is {cfg.run.dir!r}: a checkpoint", Path(cfg.run.dir), whole))
    if cfg.export.hf_dir is not None:
        needs.append((f"export.hf_dir is {cfg.export.hf_dir!r}: an export", Path(cfg.export.hf_dir), size))
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


def _optimizer_bytes(cfg: JobConfig, specs: Any) -> int:
    """Two fp32 moments a weight, and under bf16 an fp32 copy of it; with adapters only theirs, which are few."""
    count = sum(spec.num_bytes // spec.dtype.itemsize for spec in specs)
    return 0 if cfg.lora is not None else count * (12 if cfg.run.dtype == "bf16" else 8)
