"""Define the whole job's configuration as one typed value; read it from YAML and write it back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import partial
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, SerializeAsAny, ValidationError, ValidationInfo, field_validator, model_validator

import megalign.losses  # noqa: F401  fills the registry
from megalign.config.engine import EngineConfig
from megalign.config.layout import Layout
from megalign.config.sections import (
    LORA_TARGETS,
    CheckpointConfig,
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
from megalign.config.yaml_file import read_tree
from megalign.data.config import DataConfig
from megalign.losses.base import LOSSES, LossConfig, choose_loss, find_loss
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

RUN_DIR = "{run.dir}"  # placeholder in other keys for the value of run.dir


class JobConfig(Strict):
    """Holds all sections with defaults filled in, including defaults that depend on other sections."""

    run: RunConfig
    model: ModelSection
    rollout: RolloutConfig | None = None  # declared before `data`, whose defaults depend on it
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
            return reference  # the loss is invalid, which is reported separately
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
                f"teachers has {len(self.teachers)} entries: loss {self.loss.name} uses none; "
                f"must be left out, or loss.name one of: {users}"
            )
        if self.parallel.virtual_pipeline > 1:
            for key in ("overlap_p2p_comm", "batch_p2p_comm"):
                if key in self.engine.megatron:
                    raise UserError(
                        f"engine.megatron.{key} is {self.engine.megatron[key]}: with parallel.virtual_pipeline "
                        "megalign sets it itself, because batched messages between two stages are paired wrongly"
                    )
        if self.engine.name == "deepspeed":
            _check_deepspeed(self)
        else:
            _check_lora_targets(self.lora)
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise UserError(f"teachers.name is {shorten(names)}: every name must be different")
        return self


def _check_deepspeed(cfg: JobConfig) -> None:
    """Refuse what only the Megatron engine has."""
    for axis in ("pipeline", "virtual_pipeline", "expert", "sequence"):
        size, default = getattr(cfg.parallel, axis), ParallelConfig.model_fields[axis].default
        if size != default:
            raise UserError(
                f"parallel.{axis} is {str(size).lower()}: pipeline, expert and sequence parallelism are the Megatron "
                f"engine's; must be {str(default).lower()}, or engine.name megatron"
            )
    coefficient = cfg.model.aux_loss_coefficient
    if coefficient:
        raise UserError(
            f"model.aux_loss_coefficient is {coefficient}: the load-balancing loss is the Megatron engine's; "
            "must be 0, or engine.name megatron"
        )


def _check_lora_targets(lora: LoraConfig | None) -> None:
    """Refuse names of layers that no family of the Megatron engine has."""
    for index, target in enumerate(() if lora is None else lora.targets):
        if target not in LORA_TARGETS:
            allowed = " or ".join([", ".join(map(repr, LORA_TARGETS[:-1])), repr(LORA_TARGETS[-1])])
            raise UserError(f"lora.targets.{index} is {target!r}: must be {allowed}")


def _check_plain(cfg: JobConfig) -> None:
    """Check a job without rounds: `data` must name records, and `run` its length."""
    if cfg.run.steps is None and cfg.run.epochs is None:
        raise UserError("run.steps is missing; must be given, or run.epochs")
    if cfg.run.steps is not None and cfg.run.epochs is not None:
        raise UserError(
            f"run.epochs is {cfg.run.epochs}: run.steps is {cfg.run.steps} already; must be only one of them: "
            "run.steps=null or run.epochs=null unsets the other"
        )
    if cfg.data.path is None and cfg.data.sources is None:
        raise UserError("data.path is missing; must be given, or data.sources")
    if cfg.data.groups_per_step is None:
        raise UserError("data.groups_per_step is missing; it is required without a rollout section")


def _check_rounds(cfg: JobConfig, rollout: RolloutConfig) -> None:
    """Check a job of rounds: data and length come from `rollout`, so `data` and `run` must not set them."""
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
        raise UserError(
            f"loss.name is {cfg.loss.name!r}: it does not use rewards; "
            "must be a loss that does, or the rollout section left out"
        )
    if rollout.k < 2:
        raise UserError(f"rollout.k is {rollout.k}: must be at least 2, since loss {cfg.loss.name} compares responses")
    if rollout.max_new_tokens >= cfg.data.max_length:
        raise UserError(
            f"rollout.max_new_tokens is {rollout.max_new_tokens}: must be below data.max_length {cfg.data.max_length}, "
            "which counts the prompt too"
        )


def scored_models(cfg: JobConfig) -> dict[str, str]:
    """Return {field: path} of the models that a job scores besides its own: a reference's and the teachers'."""
    source = cfg.reference.source
    own = {} if source in ("initial", "round_start", "none", None) else {"reference.source": str(source)}
    return own | {f"teachers.{index}.path": teacher.path for index, teacher in enumerate(cfg.teachers)}


def load_config(path: str, overrides: Sequence[str] = ()) -> JobConfig:
    """Return the job's configuration from a YAML file with `key.sub=value` overrides.

    Every error is a UserError of one line that begins with its source, the file or the command line.
    """
    tree, origins = read_tree(path, overrides, partial(is_text_key, overrides))
    try:
        return JobConfig.model_validate(_with_run_dir(_without_unset(tree), tree.get("run")))
    except ValidationError as error:
        problems = find_problems(error, model=JobConfig)
        raise UserError(all_problems(problems, lambda problem: origins.of(problem.keys))) from None
    except UserError as error:
        raise UserError(f"{origins.of_message(str(error), tree)}: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: a section contains itself through a YAML alias; must be a tree") from None


def _without_unset(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree without null sections that have defaults, as if they had not been written."""
    fields = JobConfig.model_fields
    unset = {key for key, value in tree.items() if value is None and key in fields}
    return {key: value for key, value in tree.items() if not (key in unset and isinstance(fields[key].default, Strict))}


def _with_run_dir(value: Any, run: Any, keys: tuple[str, ...] = ()) -> Any:
    """Return the tree with `{run.dir}` in its texts replaced by the value of run.dir."""
    if isinstance(value, dict):
        return {key: _with_run_dir(inner, run, (*keys, str(key))) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_run_dir(inner, run, (*keys, str(index))) for index, inner in enumerate(value)]
    if not isinstance(value, str):
        return value
    exported = keys == ("export", "hf_dir")  # a misspelt placeholder would become a directory name
    for name in re.findall(r"\{[{\s]*(?:\w+\.[\w.]+|run\w*)\s*\}*" if exported else r"\{\s*run\b[^{}]*\}", value):
        if name != RUN_DIR or keys == ("run", "dir"):
            allowed = "be a path without braces" if keys == ("run", "dir") else f"have {RUN_DIR} or no braces"
            raise UserError(f"{'.'.join(keys)} is {shorten(value)}: {name} is no known placeholder; must {allowed}")
    folder = run.get("dir") if isinstance(run, dict) else None
    return value.replace(RUN_DIR, folder) if isinstance(folder, str) else value


def is_text_key(overrides: Sequence[str], keys: Sequence[str], tree: Mapping[str, Any]) -> bool:
    """Return whether a dotted key's value is text, not YAML; true for unknown keys, which are reported later.

    overrides, tree: searched for loss.name, since a user's own loss declares its own keys.
    """
    annotation: Any = JobConfig
    for key in keys:
        section = section_of(annotation)
        if section is None:  # inside settings that are passed through
            return False
        sections = _loss_sections(overrides, tree) if section is LossConfig else [section]
        annotation = next((names[key] for names in map(key_names, sections) if key in names), None)
        if annotation is None:
            return True
    return takes_text(annotation)


def _loss_sections(overrides: Sequence[str], tree: Mapping[str, Any]) -> list[type[LossConfig]]:
    """Return the configuration classes of the user's own losses that are named, then of the built-in losses."""
    raw = tree.get("loss")
    names = [raw.get("name")] if isinstance(raw, dict) else []
    names += [text for key, _, text in (override.partition("=") for override in overrides) if key == "loss.name"]
    sections: list[type[LossConfig]] = []
    for name in reversed(names):
        if isinstance(name, str) and ":" in name:
            with suppress(UserError):  # reported when the whole configuration is read
                sections.append(find_loss(name).config)
    return sections + [loss.config for loss in LOSSES.values()]


def dump_config(cfg: JobConfig) -> str:
    """Return the resolved configuration as YAML that loads back to an equal value."""
    return yaml.safe_dump(cfg.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def total_steps(cfg: JobConfig, num_records: int) -> int:
    """Return the run's number of optimizer steps; with epochs, the whole steps that fit into them, at least one."""
    if cfg.rollout is not None:
        return cfg.rollout.rounds * cfg.rollout.updates_per_round
    if cfg.run.steps is not None:
        return cfg.run.steps
    assert cfg.run.epochs is not None and cfg.data.groups_per_step is not None
    # A Fraction of the decimal as written avoids rounding: 0.29 epochs of 100 records are 29 records.
    return max(1, math.floor(Fraction(str(cfg.run.epochs)) * num_records / cfg.data.groups_per_step))


def layout_of(cfg: JobConfig) -> Layout:
    """Return the job's parallel axes."""
    return Layout(**cfg.parallel.model_dump())
