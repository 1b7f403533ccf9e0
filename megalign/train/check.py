"""Reads and checks all inputs of a job in one process, without building a model or a process group."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalign.config.job import JobConfig, scored_models
from megalign.convert.hf.model import HFModel, read_model
from megalign.convert.hf.reader import TOKENIZER_FILES, resolve_model
from megalign.data.dataset import GroupDataset, load_dataset
from megalign.data.group import TokenSequence
from megalign.data.record_counts import RecordCounts
from megalign.data.tokenize import retokenize
from megalign.engines.build import engine_package, temperature_of
from megalign.rollout.ends import check_ends
from megalign.rollout.prompts import Prompt, load_prompts
from megalign.rollout.rewards import choose_reward
from megalign.schema import UserError
from megalign.scores.teachers import TeacherTexts
from megalign.train.fingerprint import check_allow
from megalign.train.inputs import Inputs, Records


def check(cfg: JobConfig, world_size: int) -> Inputs:
    """Read models, tokenizer and all records; UserError for anything that would stop the job later."""
    check_allow(cfg)
    model = check_model(cfg, cfg.model.path, field="model.path", world_size=world_size, trained=True)
    vocab_size = model.facts.vocab_size
    others = {
        field: check_model(cfg, path, field=field, world_size=world_size) for field, path in scored_models(cfg).items()
    }
    reference = others.pop("reference.source", None)
    if reference is not None:
        size = reference.facts.vocab_size
        if size != vocab_size:
            raise UserError(
                f"reference.source is {cfg.reference.source!r}: its vocabulary has {size} tokens; "
                f"must be that of model.path, {vocab_size}"
            )
    teachers = list(others.values())
    engine_package(cfg).check(cfg, model)
    if "wandb" in cfg.trackers and importlib.util.find_spec("wandb") is None:
        raise UserError("trackers has 'wandb': the package is missing; pip install wandb, or leave it out")
    eval_path = cfg.eval.path
    if eval_path is not None and not Path(eval_path).exists():
        raise UserError(f"eval.path is {eval_path!r}: no such file or directory; must be one that data.path would take")
    tokenizer = load_tokenizer(model.folder)
    if cfg.rollout is not None:
        prompts, note = read_prompts(cfg, "rollout.path", cfg.rollout.path, tokenizer, vocab_size)
        check_ends(model.folder, tokenizer, vocab_size=vocab_size)
        held_out: Sequence[Prompt] = ()
        notes = [note]
        if eval_path is not None:
            held_out, note = read_prompts(cfg, "eval.path", eval_path, tokenizer, vocab_size)
            notes.append(f"held-out {note}")
        return Inputs(model, tokenizer, None, prompts, reference, teachers, held_out_prompts=held_out, notes=notes)
    records, held_out_records = read_records(cfg, tokenizer, vocab_size, teachers), None
    if eval_path is not None:
        held_out_records = read_records(cfg, tokenizer, vocab_size, teachers, path=eval_path)
    return Inputs(model, tokenizer, records, (), reference, teachers, held_out_records)


def check_model(cfg: JobConfig, path: str, *, field: str, world_size: int, trained: bool = False) -> HFModel:
    """Read a checkpoint; UserError where the engine cannot make a model of it or it does not fit the job's layout."""
    package = engine_package(cfg)
    try:
        model = read_model(resolve_model(path))
        package.check_weights(model)
    except UserError as error:
        raise UserError(f"{field}: {error}") from None
    problem = package.layout_problem(cfg, model, world_size, trained=trained)
    if problem is not None:
        raise UserError(problem if trained else f"{field}: {problem}")
    return model


def load_tokenizer(hf_dir: Path) -> Any | None:
    """Load the checkpoint's tokenizer; None where it has no tokenizer files."""
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


def read_records(
    cfg: JobConfig, tokenizer: Any | None, vocab_size: int, teachers: Sequence[HFModel], *, path: str | None = None
) -> Records:
    """Read the job's records before `data.filter`, or those of `path` by the same rules, never filtered."""
    update: dict[str, Any] = {} if path is None else {"path": path, "sources": None, "filter": None}
    data = cfg.data.model_copy(update=update)
    traits = cfg.loss.traits()
    dataset = load_dataset(
        data,
        tokenizer,
        pairing=traits.pairing,
        seed=cfg.run.seed,
        vocab_size=vocab_size,
        old_temperature=temperature_of(cfg) if traits.old else None,
    )
    if (traits.teachers or data.filter is not None) and not cfg.teachers:
        for group, origin in zip(dataset.groups, dataset.origins, strict=True):
            if not group.teacher_scores:
                user = f"loss {cfg.loss.name}" if traits.teachers else "data.filter"
                raise UserError(f"{origin}: teacher_scores is missing; {user} needs it where there are no teachers")
    to_score = (teacher_texts(cfg, dataset, index, model, tokenizer) for index, model in enumerate(teachers))
    return Records(dataset, [texts for texts in to_score if texts is not None])


def teacher_texts(
    cfg: JobConfig, dataset: GroupDataset, index: int, model: HFModel, own_tokenizer: Any | None
) -> TeacherTexts | None:
    """Return the texts that `teachers.<index>`, a `model`, has to score; None where every record brings its score."""
    teacher = cfg.teachers[index]
    lacking = [number for number, group in enumerate(dataset.groups) if teacher.name not in group.teacher_scores]
    if not lacking:
        return None
    tokenizer = load_tokenizer(model.folder)
    same = tokenizer is None or (own_tokenizer is not None and tokenizer.get_vocab() == own_tokenizer.get_vocab())
    sequences = []
    for number, record in enumerate(lacking):
        sequence = _as_read(cfg, dataset, record, number, tokenizer, same_ids=same)
        highest = max(sequence.prompt_ids + sequence.response.ids)
        if highest >= model.facts.vocab_size:
            raise UserError(
                f"{dataset.origins[record]}: token id {highest}; must be below {model.facts.vocab_size}, the "
                f"vocabulary of teachers.{index}.path {teacher.path}"
            )
        sequences.append(sequence)
    return TeacherTexts(teacher.name, model, lacking, sequences)


def _as_read(
    cfg: JobConfig, dataset: GroupDataset, record: int, number: int, tokenizer: Any | None, *, same_ids: bool
) -> TokenSequence:
    """Return a record's response as a teacher tokenizes it, with the teacher's chat template and without truncation."""
    group, origin = dataset.groups[record], dataset.origins[record]
    holders = [group.raw, *group.raw.get("responses", [])]
    brings_ids = any(name in holder for holder in holders for name in ("prompt_ids", "response_ids"))
    if same_ids and brings_ids:
        return TokenSequence(group.record, number, "response", group.prompt_ids, group.responses[0])
    if tokenizer is None:
        raise UserError(f"{origin}: the teacher has no tokenizer; must be token ids, or have teacher_scores")
    prompt_ids, response = retokenize(
        group,
        tokenizer,
        format=cfg.data.format,
        train_on=cfg.data.train_on,
        origin=origin,
        options=cfg.data.text_options,
    )
    return TokenSequence(group.record, number, "response", prompt_ids, response)


def read_prompts(
    cfg: JobConfig, field: str, path: str, tokenizer: Any | None, vocab_size: int
) -> tuple[list[Prompt], str]:
    """Read prompts that leave room for a response within `data.max_length`; return them and a line about the file."""
    assert cfg.rollout is not None
    report = RecordCounts()
    prompts = load_prompts(
        path,
        tokenizer,
        reward=choose_reward(cfg.rollout.reward),
        vocab_size=vocab_size,
        max_length=cfg.data.max_length - cfg.rollout.max_new_tokens,
        field=field,
        options=cfg.data.text_options,
        extra_fields=cfg.data.extra_fields,
        on_bad_record=cfg.data.on_bad_record,
        report=report,
    )
    first = f"; the first problem: {report.first_problem()}" if report.bad else ""
    return prompts, f"prompts: {report.line()}{first}"
