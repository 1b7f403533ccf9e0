"""Refuses a job whose ranks would compute different things: configuration, code, packages, data, order, tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megalign.config.job import JobConfig
from megalign.convert.hf.digest import tokenizer_digest
from megalign.data.order import epoch_order
from megalign.runtime.ranks import SharedError, by_value, gather, span
from megalign.runtime.versions import NUMERIC, versions
from megalign.schema import shorten
from megalign.train.fingerprint import prompts_digest, records_digest
from megalign.train.inputs import Inputs

CONFIGURATION = "the configuration"


def check_alike(cfg: JobConfig, items: Mapping[str, str]) -> None:
    """Raise SharedError on every rank where the ranks differ, with the item, its values and ranks; a collective.

    items: of this rank, by `rank_items`.
    """
    by_rank = gather(items)
    if any(other[CONFIGURATION] != items[CONFIGURATION] for other in by_rank):
        by_rank = gather(dict(_flat(cfg.model_dump(mode="json", by_alias=True))))
    problem = first_difference(by_rank)
    if problem:
        raise SharedError(problem)


def rank_items(cfg: JobConfig, inputs: Inputs) -> dict[str, str]:
    """Return {item: its version or hash} of what must be the same on all ranks, as this rank has it."""
    found = versions()
    result = {CONFIGURATION: _hash(cfg.model_dump(mode="json", by_alias=True))}
    result |= {name: found[name] for name in NUMERIC}
    result["the tokenizer of model.path"] = tokenizer_digest(inputs.policy.folder)[:12]
    if inputs.records is None:
        result["the prompts of rollout.path"] = prompts_digest(inputs.prompts)[:12]
        return result
    dataset = inputs.records.dataset
    order = epoch_order(0, tuple(dataset.spans), seed=dataset.seed, shuffle=cfg.data.shuffle)
    result["the records of data.path"] = records_digest(dataset)[:12]
    result["the order of the records"] = hashlib.blake2b(order.tobytes(), digest_size=6).hexdigest()
    return result


def first_difference(by_rank: Sequence[Mapping[str, str]]) -> str:
    """Return the first item in which ranks differ, with every value and the ranks that have it; "" where none do."""
    for name in dict.fromkeys(name for items in by_rank for name in items):
        values = by_value([items.get(name, "absent") for items in by_rank])
        if len(values) > 1:
            shown = ", ".join(f"{value} on {span(ranks)}" for value, ranks in list(values.items())[:4])
            return f"{name} is {shown}; must be the same on all ranks of a job"
    return ""


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=6).hexdigest()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key with its sections, value as text) of a configuration."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", shorten(value)
