"""Everything a job reads before its first step, read and checked by one process without a model or a process group."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalign.config import JobConfig, check_layout
from megalign.convert.hf_config import read_model_config
from megalign.convert.model_config import ModelConfig
from megalign.convert.reader import TOKENIZER_FILES, audit, resolve_model
from megalign.data.dataset import GroupDataset, load_dataset
from megalign.rollout.prompts import Prompt, load_prompts
from megalign.rollout.rewards import choose_reward
from megalign.schema import UserError


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the checks have read; `dataset` is None and `prompts` holds the prompts with a rollout section."""

    hf_dir: Path
    model: ModelConfig
    tokenizer: Any | None  # None where the checkpoint has none; records then bring token ids
    dataset: GroupDataset | None
    prompts: Sequence[Prompt]


def check(cfg: JobConfig, world_size: int) -> Inputs:
    """Refuse what would stop the job later: models, layout, tokenizer, all records."""
    hf_dir, model = check_model(cfg, cfg.model.path, field="model.path", world_size=world_size)
    if cfg.reference.source not in ("initial", "round_start", "none", None):
        _, reference = check_model(cfg, cfg.reference.source, field="reference.source", world_size=world_size)
        if reference.vocab_size != model.vocab_size:
            raise UserError(
                f"reference.source is {cfg.reference.source!r}: its vocabulary has {reference.vocab_size} tokens; "
                f"must be that of model.path, {model.vocab_size}"
            )
    for place, teacher in enumerate(cfg.teachers):
        check_model(cfg, teacher.path, field=f"teachers.{place}.path", world_size=world_size)
    if cfg.engine.megatron:
        check_passed_through(cfg.engine.megatron)
    tokenizer = load_tokenizer(hf_dir)
    if cfg.rollout is not None:
        prompts = read_prompts(cfg, cfg.rollout.path, tokenizer, model)
        if cfg.eval.path is not None:
            read_prompts(cfg, cfg.eval.path, tokenizer, model)
        return Inputs(hf_dir, model, tokenizer, None, prompts)
    dataset = read_dataset(cfg, tokenizer, model)
    if cfg.eval.path is not None:
        read_dataset(cfg, tokenizer, model, path=cfg.eval.path)
    return Inputs(hf_dir, model, tokenizer, dataset, ())


def check_model(cfg: JobConfig, path: str, *, field: str, world_size: int) -> tuple[Path, ModelConfig]:
    """A checkpoint's directory and description, when all its tensors are there and it fits the job's layout."""
    try:
        hf_dir = resolve_model(path)
        model = read_model_config(hf_dir)
        audit(hf_dir, model)
    except UserError as error:
        raise UserError(f"{field}: {error}") from None
    check_layout(cfg, model, world_size)
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


def read_dataset(cfg: JobConfig, tokenizer: Any | None, model: ModelConfig, *, path: str | None = None) -> GroupDataset:
    """The job's records, or those of `path` read by the same rules; the teachers' filter is not applied yet."""
    data = cfg.data if path is None else cfg.data.model_copy(update={"path": path, "sources": None})
    traits = cfg.loss.traits()
    dataset = load_dataset(data, tokenizer, pairing=traits.pairing, seed=cfg.run.seed, vocab_size=model.vocab_size)
    if (traits.teachers or data.filter is not None) and not cfg.teachers:
        for group, origin in zip(dataset.groups, dataset.origins, strict=True):
            if not group.teacher_scores:
                user = f"loss {cfg.loss.name}" if traits.teachers else "data.filter"
                raise UserError(f"{origin}: teacher_scores is missing; {user} needs it where there are no teachers")
    return dataset


def read_prompts(cfg: JobConfig, path: str, tokenizer: Any | None, model: ModelConfig) -> list[Prompt]:
    """Prompts that leave a response its room within `data.max_length`, with what the reward reads of them."""
    assert cfg.rollout is not None
    return load_prompts(
        path,
        tokenizer,
        reward=choose_reward(cfg.rollout.reward),
        vocab_size=model.vocab_size,
        max_length=cfg.data.max_length - cfg.rollout.max_new_tokens,
    )
