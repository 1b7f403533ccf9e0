"""Reads a checkpoint of a ZeRO run as Hugging Face tensors; what did not train is read from the run's base model."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalign.convert.hf.auto_model import meta_model
from megalign.convert.hf.auto_names import AutoNames, TensorGroup
from megalign.convert.hf.auto_source import AutoSource
from megalign.convert.hf.config_json import read_json
from megalign.convert.hf.model import read_model
from megalign.convert.hf.reader import resolve_model
from megalign.convert.hf.safetensors_file import Spec
from megalign.convert.megatron.checkpoint_dir import FACTS, HF_FILES
from megalign.convert.zero.files import FOLDER
from megalign.convert.zero.source import ZeroSource
from megalign.model_config import Lora
from megalign.schema import UserError

LORA_A, LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"  # PEFT's names of a layer's adapter
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


class ZeroModel:
    """Reads a checkpoint that the engine deepspeed wrote as Hugging Face tensors, in transformers' own names.

    LoRA adapters are merged into their weights. The constructor checks that every tensor of the model is in the
    checkpoint or in its base model, and that there are no others. Safe for several threads; each keeps one group of
    tensors that are converted together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        plain = _facts(folder)
        self.lora = _lora(folder, plain)
        self.base: str = plain["base"]
        self.dtype = DTYPES[plain["dtype"]]
        self.zero = ZeroSource(folder / FOLDER)
        self.names = AutoNames(meta_model(folder / HF_FILES, dtype=self.dtype))
        self.specs = self.names.specs
        self.group_of = {name: group for group in self.names.groups for name in group.stored}
        self.adapted = [name.removesuffix(LORA_A) for name in self.zero.specs if name.endswith(LORA_A)]
        self.trained = self._trained()
        frozen = [name for name in self.names.tensors if name not in self.trained]
        self.rest: AutoSource | None = None
        self.frozen_groups: Mapping[str, TensorGroup] = {}
        if frozen:
            self.rest, self.frozen_groups = self._base_source(frozen)
        self.lock, self.held = threading.Lock(), threading.local()

    def _trained(self) -> dict[str, str]:
        """Return {the model's tensor: its name in the checkpoint}; UserError for names or shapes that do not fit."""
        trained = {}
        for stored, spec in self.zero.specs.items():
            if self.lora is not None and stored.endswith((LORA_A, LORA_B)):
                continue
            name = self.names.shared.get(stored, stored)
            wanted = tuple(self.names.tensors[name].shape) if name in self.names.tensors else None
            if wanted != spec.shape:
                place = "no place" if wanted is None else f"shape {list(wanted)}"
                raise UserError(
                    f"{self.zero.folder}: parameter {stored} has shape {list(spec.shape)}; it has {place} in the model "
                    "of hf/config.json"
                )
            trained[name] = stored
        for layer in self.adapted:
            if f"{layer}{LORA_B}" not in self.zero.specs or f"{layer}.weight" not in self.names.tensors:
                raise UserError(f"{self.zero.folder}: {layer}{LORA_A} is no adapter of the model of hf/config.json")
        return trained

    def _base_source(self, frozen: list[str]) -> tuple[AutoSource, dict[str, TensorGroup]]:
        """Open the base model; return it with its group of each tensor."""
        try:
            source = AutoSource(read_model(self._base_folder()), self.names)
        except UserError as error:
            raise UserError(f"{self.folder} holds what trained, and model.path the rest: {error}") from None
        groups = {name: group for group in source.groups for name in group.module}
        missing = [name for name in frozen if name not in groups]
        if missing:
            raise UserError(f"{self.base}: tensor {missing[0]} is missing, which {self.folder} takes from there")
        return source, groups

    def _base_folder(self) -> Path:
        """Return where the run read its base model, if that is still there, else what model.path names from here."""
        read_by_run = self.zero.index.source
        if read_by_run is not None and (Path(read_by_run) / "config.json").is_file():
            return Path(read_by_run)
        return resolve_model(self.base)

    @property
    def files(self) -> list[Path]:
        """Return all files that are read."""
        base = [] if self.rest is None else sorted(set(self.rest.stored.raw_files.values()))
        return sorted(path for path in self.folder.rglob("*") if path.is_file()) + base

    def specs_in(self, dtype: torch.dtype | None) -> Mapping[str, Spec]:
        """Return the tensors in `dtype`, except those with a dtype of their own; None: as trained."""
        return self.specs if dtype is None else AutoNames(meta_model(self.folder / HF_FILES, dtype=dtype)).specs

    def tensor(self, name: str) -> Tensor:
        """Read a Hugging Face tensor in the dtype of training."""
        group = self.group_of[name]
        if getattr(self.held, "group", None) is not group:
            module = {each: self._module_tensor(each) for each in group.module}
            with self.lock:
                self.held.tensors = self.names.to_checkpoint(module)
            self.held.group = group
        tensor: Tensor = self.held.tensors[name]
        return tensor

    def _module_tensor(self, name: str) -> Tensor:
        """Read a tensor of transformers' model, with its adapter merged."""
        if name in self.trained:
            value = self.zero.weight(self.trained[name])
        else:
            assert self.rest is not None
            with self.lock:
                value = self.rest.read(self.frozen_groups[name])[name].to(self.names.tensors[name].dtype)
        layer = name.removesuffix(".weight")
        if self.lora is None or f"{layer}{LORA_A}" not in self.zero.specs:
            return value
        a, b = (self.zero.weight(f"{layer}{half}").float() for half in (LORA_A, LORA_B))
        change = self.lora.alpha / self.lora.rank * (b @ a)
        # GPT-2's layers keep their weights transposed.
        transposed = type(self.names.model.get_submodule(layer)).__name__ == "Conv1D"
        return (value.float() + (change.T if transposed else change)).to(value.dtype)

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (PEFT name, tensor) of each adapter weight."""
        for layer in self.adapted:
            yield f"{layer}.lora_A.weight", self.zero.weight(f"{layer}{LORA_A}")
            yield f"{layer}.lora_B.weight", self.zero.weight(f"{layer}{LORA_B}")


def _facts(folder: Path) -> dict[str, Any]:
    """Read what a conversion needs of a checkpoint's facts; UserError where megalign did not write it."""
    for name in (FACTS, f"{HF_FILES}/config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing; must be a checkpoint that megalign wrote")
    plain = read_json(folder / FACTS)
    allowed = {"dtype": tuple(DTYPES), "engine": ("deepspeed",)}
    for key, values in allowed.items():
        if plain.get(key) not in values:
            raise UserError(f"{folder / FACTS}: {key} is {plain.get(key)!r}; must be {' or '.join(values)}")
    if not isinstance(plain.get("base"), str):
        raise UserError(f"{folder / FACTS}: base is {plain.get('base')!r}; must be the model.path of the run")
    return plain


def _lora(folder: Path, plain: Mapping[str, Any]) -> Lora | None:
    lora = plain.get("adapters")
    kinds = {"rank": int, "alpha": int | float, "targets": list}
    if lora is not None and not (
        isinstance(lora, dict) and all(isinstance(lora.get(key), kind) for key, kind in kinds.items())
    ):
        raise UserError(f"{folder / FACTS}: adapters is {lora!r}; must be null or have rank, alpha, targets")
    return None if lora is None else Lora(lora["rank"], lora["alpha"], tuple(lora["targets"]))
