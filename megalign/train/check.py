"""Everything a job reads before its first step, read and checked by one process without a model or a process group."""

from __future__ import annotations

import difflib
import fnmatch
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalign.config import JobConfig, check_layout
from megalign.convert.hf_config import read_model_config
from megalign.convert.model_config import ModelConfig
from megalign.convert.reader import TOKENIZER_FILES, audit, resolve_model
from megalign.convert.rules import lora_targets
from megalign.data.dataset import GroupDataset, load_dataset
from megalign.data.group import Sequence as FlatSequence
from megalign.data.report import Report
from megalign.data.tokenize import retokenize
from megalign.engines.megatron_state import holds_optimizer, saved_lora
from megalign.rollout.ends import check_ends
from megalign.rollout.prompts import Prompt, load_prompts
from megalign.rollout.rewards import choose_reward
from megalign.schema import UserError, shorten
from megalign.sections import MEGATRON_SETTINGS
from megalign.train.fingerprint import check_allow
from megalign.train.session import lora_of, temperature_of


@dataclass(frozen=True, slots=True)
class TeacherTexts:
    """What one teacher has to score: which records lack its score, and their responses as it reads them."""

    name: str
    hf_dir: Path
    model: ModelConfig
    places: list[int]  # in the data set's groups
    sequences: list[FlatSequence]


@dataclass(frozen=True, slots=True)
class Records:
    """A data set that passed, and what the teachers have to score of it."""

    dataset: GroupDataset
    teachers: Sequence[TeacherTexts] = ()


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the checks have read: records, or with a rollout section prompts; the held-out ones are of the same kind."""

    hf_dir: Path
    model: ModelConfig
    tokenizer: Any | None  # None where the checkpoint has none; records then bring token ids
    records: Records | None
    prompts: Sequence[Prompt]
    reference: tuple[Path, ModelConfig] | None = None  # where it is a checkpoint of its own
    held_out_records: Records | None = None
    held_out_prompts: Sequence[Prompt] = ()
    notes: Sequence[str] = ()  # what became of the prompts' records, for the log


def check(cfg: JobConfig, world_size: int) -> Inputs:
    """Refuse what would stop the job later: models, layout, tokenizer, all records."""
    check_allow(cfg)
    hf_dir, model = check_model(cfg, cfg.model.path, field="model.path", world_size=world_size, trained=True)
    reference = None
    if cfg.reference.source not in ("initial", "round_start", "none", None):
        reference = check_model(cfg, cfg.reference.source, field="reference.source", world_size=world_size)
        if reference[1].vocab_size != model.vocab_size:
            raise UserError(
                f"reference.source is {cfg.reference.source!r}: its vocabulary has {reference[1].vocab_size} tokens; "
                f"must be that of model.path, {model.vocab_size}"
            )
    for place, teacher in enumerate(cfg.teachers):
        check_model(cfg, teacher.path, field=f"teachers.{place}.path", world_size=world_size)
    for place, target in enumerate(() if cfg.lora is None else cfg.lora.targets):
        if target not in lora_targets(model):
            raise UserError(
                f"lora.targets.{place} is {target!r}: no layer of model.path has that; must be of "
                f"{', '.join(lora_targets(model))}"
            )
    if cfg.engine.megatron:
        check_passed_through(cfg.engine.megatron)
        check_split(cfg, model)
    if "wandb" in cfg.trackers and importlib.util.find_spec("wandb") is None:
        raise UserError("trackers has 'wandb': the package is missing; pip install wandb, or leave it out")
    eval_path = cfg.eval.path
    if eval_path is not None and not Path(eval_path).exists():
        raise UserError(f"eval.path is {eval_path!r}: no such file or directory; must be one that data.path would take")
    tokenizer = load_tokenizer(hf_dir)
    if cfg.rollout is not None:
        prompts, told = read_prompts(cfg, "rollout.path", cfg.rollout.path, tokenizer, model)
        check_ends(hf_dir, tokenizer, vocab_size=model.vocab_size)
        held_out: Sequence[Prompt] = ()
        notes = [told]
        if eval_path is not None:
            held_out, told = read_prompts(cfg, "eval.path", eval_path, tokenizer, model)
            notes.append(f"held-out {told}")
        return Inputs(hf_dir, model, tokenizer, None, prompts, reference, held_out_prompts=held_out, notes=notes)
    records = read_records(cfg, tokenizer, model)
    held_out_records = None if eval_path is None else read_records(cfg, tokenizer, model, path=eval_path)
    return Inputs(hf_dir, model, tokenizer, records, (), reference, held_out_records)


def check_adapters(cfg: JobConfig, checkpoint: Path) -> None:
    """Refuse a run's checkpoint of other adapters than the job's; a converted one may get any."""
    saved, wanted = saved_lora(checkpoint), lora_of(cfg)
    if saved != wanted and (saved is not None or holds_optimizer(checkpoint)):
        was = "without adapters" if saved is None else f"with rank {saved.rank}, alpha {saved.alpha:g}, targets "
        was += "" if saved is None else ", ".join(saved.targets)
        raise UserError(
            f"{checkpoint} was trained {was}; lora must be the same, or model.path an export of that run; "
            "to begin anew, another run.dir or checkpoint.resume=never"
        )


def check_model(
    cfg: JobConfig, path: str, *, field: str, world_size: int, trained: bool = False
) -> tuple[Path, ModelConfig]:
    """A checkpoint's directory and description, when all its tensors are there and it fits the job's layout."""
    try:
        hf_dir = resolve_model(path)
        model = read_model_config(hf_dir)
        audit(hf_dir, model)
    except UserError as error:
        raise UserError(f"{field}: {error}") from None
    check_layout(cfg, model, world_size, trained=trained)
    return hf_dir, model


def check_passed_through(keys: Iterable[str]) -> None:
    """Refuse a key of `engine.megatron` that none of Megatron's configurations has."""
    # Imported here: Megatron takes seconds, and most jobs pass nothing through.
    from megalign.engines.megatron import DDP_FIELDS
    from megalign.models.gpt import TransformerConfig

    known = DDP_FIELDS | set(TransformerConfig.__dataclass_fields__)
    for key in keys:
        if key not in known:
            nearest = ", ".join(difflib.get_close_matches(key, sorted(known), n=3)) or "none"
            raise UserError(
                f"engine.megatron.{key} is not a known key; must be a field of Megatron-Core's TransformerConfig or "
                f"DistributedDataParallelConfig; near it: {nearest}"
            )
        if not any(fnmatch.fnmatch(key, pattern) for pattern in MEGATRON_SETTINGS):
            raise UserError(
                f"engine.megatron.{key} is not a setting of speed or memory alone; must be one of "
                f"{', '.join(MEGATRON_SETTINGS)}"
            )


def check_split(cfg: JobConfig, model: ModelConfig) -> None:
    """Refuse a split of layers over stages that Megatron could not build."""
    wanted = cfg.engine.megatron.get("pipeline_model_parallel_layout")
    if wanted is None:
        return
    # Imported here for the same reason as above.
    from megalign.models.gpt import split_problem

    parallel = cfg.parallel
    reason = split_problem(wanted, model.num_layers, parallel.pipeline, parallel.virtual_pipeline)
    if reason is not None:
        stages = parallel.pipeline * parallel.virtual_pipeline
        raise UserError(
            f"engine.megatron.pipeline_model_parallel_layout is {shorten(wanted)}: {reason}; must have {stages} stages "
            f"between bars, E in the first, L in the last, and a t for each of the model's {model.num_layers} layers"
        )


def load_tokenizer(hf_dir: Path) -> Any | None:
    """The checkpoint's tokenizer, or None where it has no files of one."""
    if not any(match for pattern in TOKENIZER_FILES for match in hf_dir.glob(pattern)):
        return None
    # Imported here: it takes seconds, and a configuration that is wrong should not wait for them.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(hf_dir), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions for files it cannot read
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{hf_dir}: its tokenizer cannot be loaded ({reason}); must be one that transformers loads"
        ) from None


def read_records(cfg: JobConfig, tokenizer: Any | None, model: ModelConfig, *, path: str | None = None) -> Records:
    """The job's records before `data.filter`, or those of `path` by the same rules, which no filter concerns."""
    update: dict[str, Any] = {} if path is None else {"path": path, "sources": None, "filter": None}
    data = cfg.data.model_copy(update=update)
    traits = cfg.loss.traits()
    dataset = load_dataset(
        data,
        tokenizer,
        pairing=traits.pairing,
        seed=cfg.run.seed,
        vocab_size=model.vocab_size,
        old_temperature=temperature_of(cfg) if traits.old else None,
    )
    if (traits.teachers or data.filter is not None) and not cfg.teachers:
        for group, origin in zip(dataset.groups, dataset.origins, strict=True):
            if not group.teacher_scores:
                user = f"loss {cfg.loss.name}" if traits.teachers else "data.filter"
                raise UserError(f"{origin}: teacher_scores is missing; {user} needs it where there are no teachers")
    found = (teacher_texts(cfg, dataset, place, tokenizer) for place in range(len(cfg.teachers)))
    return Records(dataset, [texts for texts in found if texts is not None])


def teacher_texts(cfg: JobConfig, dataset: GroupDataset, place: int, own_tokenizer: Any | None) -> TeacherTexts | None:
    """What `teachers.<place>` has to score, or None where every record brings its score."""
    teacher = cfg.teachers[place]
    places = [number for number, group in enumerate(dataset.groups) if teacher.name not in group.teacher_scores]
    if not places:
        return None
    hf_dir = resolve_model(teacher.path)
    model, tokenizer = read_model_config(hf_dir), load_tokenizer(hf_dir)
    same = tokenizer is None or (own_tokenizer is not None and tokenizer.get_vocab() == own_tokenizer.get_vocab())
    sequences = []
    for number, at in enumerate(places):
        sequence = _as_read(cfg, dataset, at, number, tokenizer, same_ids=same)
        highest = max(sequence.prompt_ids + sequence.response.ids)
        if highest >= model.vocab_size:
            raise UserError(
                f"{dataset.origins[at]}: token id {highest}; must be below {model.vocab_size}, the vocabulary of "
                f"teachers.{place}.path {teacher.path}"
            )
        sequences.append(sequence)
    return TeacherTexts(teacher.name, hf_dir, model, places, sequences)


def _as_read(
    cfg: JobConfig, dataset: GroupDataset, place: int, number: int, tokenizer: Any | None, *, same_ids: bool
) -> FlatSequence:
    """A record's response as a teacher reads it: under its own tokenizer and template, at its own length."""
    group, origin = dataset.groups[place], dataset.origins[place]
    holders = [group.raw, *group.raw.get("responses", [])]
    brings_ids = any(name in holder for holder in holders for name in ("prompt_ids", "response_ids"))
    if same_ids and brings_ids:
        return FlatSequence(group.record, number, "response", group.prompt_ids, group.responses[0])
    if tokenizer is None:
        raise UserError(f"{origin}: the teacher has no tokenizer; allowed: token ids, or teacher_scores in the record")
    prompt_ids, response = retokenize(
        group,
        tokenizer,
        format=cfg.data.format,
        train_on=cfg.data.train_on,
        origin=origin,
        options=cfg.data.text_options,
    )
    return FlatSequence(group.record, number, "response", prompt_ids, response)


def read_prompts(
    cfg: JobConfig, field: str, path: str, tokenizer: Any | None, model: ModelConfig
) -> tuple[list[Prompt], str]:
    """Prompts that leave a response its room within `data.max_length`, and what became of the file's records."""
    assert cfg.rollout is not None
    report = Report()
    prompts = load_prompts(
        path,
        tokenizer,
        reward=choose_reward(cfg.rollout.reward),
        vocab_size=model.vocab_size,
        max_length=cfg.data.max_length - cfg.rollout.max_new_tokens,
        field=field,
        options=cfg.data.text_options,
        extra_fields=cfg.data.extra_fields,
        on_bad_record=cfg.data.on_bad_record,
        report=report,
    )
    first = f"; the first problem: {report.first_problem()}" if report.bad else ""
    return prompts, f"prompts: {report.line()}{first}"
