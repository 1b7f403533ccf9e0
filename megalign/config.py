"""The whole job as one typed value: read from YAML, written back as YAML, fitted to a number of ranks."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, SerializeAsAny, ValidationError, ValidationInfo, field_validator, model_validator

import megalign.losses  # noqa: F401  fills the registry
from megalign.config_file import read_tree
from megalign.convert.model_config import ModelConfig
from megalign.data.config import DataConfig
from megalign.layout import Layout, refusal
from megalign.losses.base import LOSSES, LossConfig, choose_loss
from megalign.schema import (
    Strict,
    UserError,
    all_problems,
    find_problems,
    key_names,
    section_of,
    shorten,
    takes_text,
)
from megalign.sections import (
    CheckpointConfig,
    EngineConfig,
    EvalConfig,
    ExportConfig,
    LoraConfig,
    ModelSection,
    OptimizerSection,
    ParallelConfig,
    ReferenceConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
    WatchdogConfig,
)

RUN_DIR = "{run.dir}"  # in other keys' texts: what run.dir says


class JobConfig(Strict):
    """Every section with its defaults in place, those that depend on other sections included."""

    run: RunConfig
    model: ModelSection
    rollout: RolloutConfig | None = None  # before `data`, whose defaults look at it
    data: DataConfig
    eval: EvalConfig = EvalConfig()
    loss: Annotated[SerializeAsAny[LossConfig], BeforeValidator(choose_loss)]
    reference: ReferenceConfig = ReferenceConfig()
    teachers: list[TeacherConfig] = []
    optimizer: OptimizerSection
    parallel: ParallelConfig = ParallelConfig()
    lora: LoraConfig | None = None
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    trackers: list[Literal["tensorboard", "wandb"]] = []

    @field_validator("data")
    @classmethod
    def _groups_of_a_round(cls, data: DataConfig, info: ValidationInfo) -> DataConfig:
        rollout: RolloutConfig | None = info.data.get("rollout")
        if rollout is None or data.groups_per_step is not None:
            return data
        groups, left = divmod(rollout.prompts_per_round, rollout.updates_per_round)
        if left:
            raise UserError(
                f"rollout.updates_per_round is {rollout.updates_per_round}: must divide rollout.prompts_per_round "
                f"{rollout.prompts_per_round}, or data.groups_per_step must be given"
            )
        return data.model_copy(update={"groups_per_step": groups})

    @field_validator("reference")
    @classmethod
    def _reference_for_loss(cls, reference: ReferenceConfig, info: ValidationInfo) -> ReferenceConfig:
        if "loss" not in info.data:
            return reference  # the loss has a problem of its own, which is reported
        loss: LossConfig = info.data["loss"]
        if reference.source is None:
            return reference.model_copy(update={"source": "initial" if loss.traits().reference else "none"})
        if reference.source == "none" and loss.traits().reference:
            raise UserError(
                f"reference.source is 'none': loss {loss.name} needs a reference; "
                "must be initial, round_start or a Hugging Face directory"
            )
        return reference

    @model_validator(mode="after")
    def _sections_agree(self) -> JobConfig:
        if self.rollout is None:
            _check_plain(self)
        else:
            _check_rounds(self, self.rollout)
        if self.teachers and not self.loss.traits().teachers:
            users = ", ".join(sorted(name for name, loss in LOSSES.items() if loss.config(name=name).traits().teachers))
            raise UserError(
                f"teachers has {len(self.teachers)} entries: loss {self.loss.name} uses none; losses that do: {users}"
            )
        if self.parallel.virtual_pipeline > 1:
            for key in ("overlap_p2p_comm", "batch_p2p_comm"):
                if key in self.engine.megatron:
                    raise UserError(
                        f"engine.megatron.{key} is {self.engine.megatron[key]}: with parallel.virtual_pipeline "
                        "megalign sets it itself, because batched messages between two stages are paired wrongly"
                    )
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise UserError(f"teachers.name is {shorten(names)}: every name must be different")
        return self


def _check_plain(cfg: JobConfig) -> None:
    """Without rounds the data come from files and the length from `run`."""
    if cfg.run.steps is None and cfg.run.epochs is None:
        raise UserError("run.steps is missing; give run.steps or run.epochs")
    if cfg.run.steps is not None and cfg.run.epochs is not None:
        raise UserError(
            f"run.epochs is {cfg.run.epochs}: run.steps is {cfg.run.steps} already; give only one of them: "
            "run.steps=null or run.epochs=null unsets the other"
        )
    if cfg.data.path is None and cfg.data.sources is None:
        raise UserError("data.path is missing; give data.path or data.sources")
    if cfg.data.groups_per_step is None:
        raise UserError("data.groups_per_step is missing; it is required without a rollout section")


def _check_rounds(cfg: JobConfig, rollout: RolloutConfig) -> None:
    """With rounds the samples are the data, and the rounds are the length."""
    taken = {
        "data.path": cfg.data.path,
        "data.sources": cfg.data.sources,
        "run.steps": cfg.run.steps,
        "run.epochs": cfg.run.epochs,
    }
    for field, value in taken.items():
        if value is not None:
            raise UserError(
                f"{field} is {shorten(value)}: must be left out with a rollout section ({field}=null), which has "
                "rollout.path and rollout.rounds x rollout.updates_per_round steps"
            )
    if cfg.loss.traits().pairing.kind == "single":
        raise UserError(f"loss.name is {cfg.loss.name!r}: it does not use rewards; leave the rollout section out")
    if rollout.k < 2:
        raise UserError(f"rollout.k is {rollout.k}: must be at least 2, since loss {cfg.loss.name} compares responses")
    if rollout.max_new_tokens >= cfg.data.max_length:
        raise UserError(
            f"rollout.max_new_tokens is {rollout.max_new_tokens}: must be below data.max_length {cfg.data.max_length}, "
            "which counts the prompt too"
        )


def load_config(path: str, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a YAML file with `key.sub=value` on top; whatever is wrong is one line that begins with its source."""
    tree, origins = read_tree(path, overrides, is_text_key)
    try:
        return JobConfig.model_validate(_with_run_dir(_without_unset(tree), tree.get("run")))
    except ValidationError as error:
        problems = find_problems(error, model=JobConfig)
        raise UserError(all_problems(problems, lambda problem: origins.of(problem.keys))) from None
    except UserError as error:
        raise UserError(f"{origins.of_message(str(error), tree)}: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: a section holds itself by an alias; must be a tree") from None


def _without_unset(tree: dict[str, Any]) -> dict[str, Any]:
    """Leave out sections that are null and have defaults, as if they were not written."""
    fields = JobConfig.model_fields
    unset = {key for key, value in tree.items() if value is None and key in fields}
    return {key: value for key, value in tree.items() if not (key in unset and isinstance(fields[key].default, Strict))}


def _with_run_dir(value: Any, run: Any, keys: tuple[str, ...] = ()) -> Any:
    """A tree with `{run.dir}` in its texts replaced by what run.dir says."""
    if isinstance(value, dict):
        return {key: _with_run_dir(inner, run, (*keys, str(key))) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_run_dir(inner, run, (*keys, str(place))) for place, inner in enumerate(value)]
    if not isinstance(value, str):
        return value
    exported = keys == ("export", "hf_dir")  # where another key in braces would become a directory
    for name in re.findall(r"\{(?:run\w*|\w+\.[\w.]+)\}|\{run\b[^{}]*\}" if exported else r"\{run\b[^{}]*\}", value):
        if name != RUN_DIR or keys == ("run", "dir"):
            allowed = "be a path without braces" if keys == ("run", "dir") else f"have {RUN_DIR} or no braces"
            raise UserError(f"{'.'.join(keys)} is {shorten(value)}: {name} stands for nothing; must {allowed}")
    folder = run.get("dir") if isinstance(run, dict) else None
    return value.replace(RUN_DIR, folder) if isinstance(folder, str) else value


def is_text_key(keys: Sequence[str]) -> bool:
    """Whether a dotted key takes text as it stands; unknown ones do, so that what is told is that they are unknown."""
    annotation: Any = JobConfig
    for key in keys:
        section = section_of(annotation)
        if section is None:  # inside what is passed through
            return False
        sections = [loss.config for loss in LOSSES.values()] if section is LossConfig else [section]
        annotation = next((names[key] for names in map(key_names, sections) if key in names), None)
        if annotation is None:
            return True
    return takes_text(annotation)


def dump_config(cfg: JobConfig) -> str:
    """The resolved configuration as YAML that loads back to an equal value."""
    return yaml.safe_dump(cfg.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def total_steps(cfg: JobConfig, num_records: int) -> int:
    """Optimizer steps of the whole run: whole steps that fit into the epochs, and at least one."""
    if cfg.rollout is not None:
        return cfg.rollout.rounds * cfg.rollout.updates_per_round
    if cfg.run.steps is not None:
        return cfg.run.steps
    assert cfg.run.epochs is not None and cfg.data.groups_per_step is not None
    # Through the decimal as written: 0.1 epochs of 30 records are 3 records, and 0.29 of 100 are 29.
    return max(1, math.floor(Fraction(str(cfg.run.epochs)) * num_records / cfg.data.groups_per_step))


def check_layout(cfg: JobConfig, model: ModelConfig, world_size: int, *, trained: bool = True) -> None:
    """Refuse a layout that does not fit the ranks or the model, naming the nearest ones that do."""
    found = refusal(Layout(**cfg.parallel.model_dump()), model, world_size, trained=trained)
    if found is not None:
        raise UserError(found)
    if trained and cfg.model.aux_loss_coefficient and model.moe is None:
        raise UserError(
            f"model.aux_loss_coefficient is {cfg.model.aux_loss_coefficient}: the model has no experts; must be 0"
        )
