"""Reads the description in a megalign checkpoint (dtype, optimizer, adapters), without Megatron."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalign.convert.megatron.torch_dist import TorchDistReader
from megalign.model_config import Lora
from megalign.schema import UserError

ADAPTER_KINDS = {"rank": int, "alpha": int | float, "targets": list | tuple}


@dataclass(frozen=True, slots=True)
class About:
    """Describes a checkpoint: plain values that are saved beside its tensors."""

    dtype: str  # of most weights, torch's name
    optimizer: bool  # whether it holds optimizer state; a converted checkpoint does not
    lora: Lora | None = None
    base: str | None = None  # `model.path` of the adapters' base model


def read_about(folder: Path) -> About:
    """Read a checkpoint's own description; UserError where megalign did not write it."""
    return parse_about(folder, TorchDistReader(folder).common())


def parse_about(folder: Path, common: Mapping[str, Any]) -> About:
    """Return the description in a checkpoint's common values; UserError where megalign did not write it."""
    about = common.get("about")
    if not isinstance(about, dict):
        raise UserError(f"{folder} was not written by megalign; must be a checkpoint of a run or of megalign convert")
    lora, base = about.get("lora"), about.get("base")
    good = isinstance(lora, dict) and all(isinstance(lora.get(key), kind) for key, kind in ADAPTER_KINDS.items())
    if lora is not None and not good:
        raise UserError(f"{folder}/common.pt: about.lora is {lora!r}; must be null or have rank, alpha, targets")
    if not isinstance(base, str | None):
        raise UserError(f"{folder}/common.pt: about.base is {base!r}; must be the name of a model")
    adapters = None if lora is None else Lora(lora["rank"], lora["alpha"], tuple(lora["targets"]))
    return About(str(about.get("dtype")), bool(about.get("optimizer")), adapters, base)
