"""Reads a megalign checkpoint as Hugging Face tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megalign.convert.hf.config import read_model_config
from megalign.convert.hf.safetensors_file import Spec
from megalign.convert.hf.writer import fixed_dtypes
from megalign.convert.megatron.about import parse_about
from megalign.convert.megatron.checkpoint_dir import HF_FILES, MARK
from megalign.convert.megatron.keys import checkpoint_key, whole_shape
from megalign.convert.megatron.torch_dist import TorchDistReader
from megalign.convert.naming import megatron_names
from megalign.convert.rules import Piece, find_rule
from megalign.model_config import ModelConfig
from megalign.schema import UserError

MERGED_AT_ONCE = 1 << 24  # values
STATE = ("optimizer.", "adapters.", "rng_state", "rerun_state")  # prefixes of a run's keys that are not model weights


def whole_names(model: ModelConfig) -> list[str]:
    """List all Megatron parameters of a model."""
    return megatron_names(model, layers=range(model.num_layers), first=True, last=True)


def key_specs(specs: Mapping[str, Spec], model: ModelConfig) -> dict[str, Spec]:
    """Return the stacked tensors in a checkpoint's index, by key, from Megatron parameters by name."""
    by_key = {}
    for name, spec in specs.items():
        key, _, counts = checkpoint_key(name, model)
        by_key[key] = Spec((*counts, *spec.shape), spec.dtype)
    return by_key


@dataclass
class MegatronSource:
    """Reads a megalign checkpoint as Hugging Face tensors; LoRA adapters are merged into their weights.

    The constructor checks that every tensor of the model is there in its shape, and that there are no others.
    """

    folder: Path
    model: ModelConfig = field(init=False)
    specs: dict[str, Spec] = field(init=False)  # of the Hugging Face tensors

    def __post_init__(self) -> None:
        config = self.folder / HF_FILES / "config.json"
        if not (self.folder / MARK).is_file() or not config.is_file():
            needed = f"a directory with {MARK} and {HF_FILES}/config.json, such as RUN_DIR/checkpoints/step_00000100"
            raise UserError(f"{self.folder} is not a megalign checkpoint; must be {needed}")
        self.model = read_model_config(self.folder / HF_FILES)
        self.reader = TorchDistReader(self.folder)
        about = parse_about(self.folder, self.reader.common())
        self.lora, self.base = about.lora, about.base
        self._audit()
        self.parts = _parts(self.model)
        self.specs = {}
        for name, parts in self.parts.items():
            (megatron, _, piece, _), *_ = parts
            dtype = self.reader.specs[checkpoint_key(megatron, self.model)[0]].dtype
            self.specs[name] = Spec(piece.stored_shape(self.model), dtype)

    @property
    def files(self) -> list[Path]:
        """Return all files that are read."""
        return sorted(path for path in self.folder.iterdir() if path.is_file())

    def specs_in(self, dtype: torch.dtype | None) -> Mapping[str, Spec]:
        """Return the tensors in `dtype`, except those with a dtype of their own; None: as stored."""
        if dtype is None:
            return self.specs
        fixed = fixed_dtypes(self.model)
        return {name: spec if name in fixed else Spec(spec.shape, dtype) for name, spec in self.specs.items()}

    def _audit(self) -> None:
        needed = key_specs(
            {name: Spec(whole_shape(name, self.model), torch.float32) for name in whole_names(self.model)}, self.model
        )
        stored = self.reader.specs
        for key, spec in needed.items():
            if key not in stored:
                raise UserError(
                    f"{self.folder}: tensor {key} is missing; {self.model.family} (hf/config.json) needs it"
                )
            if stored[key].shape != spec.shape:
                shapes = f"has shape {list(stored[key].shape)}; hf/config.json asks for {list(spec.shape)}"
                raise UserError(f"{self.folder}: tensor {key} {shapes}")
        extra = [key for key in stored if key not in needed and not key.startswith(STATE)]
        if extra:
            raise UserError(f"{self.folder}: tensor {extra[0]} has no place in this {self.model.family} model")

    def tensor(self, name: str) -> Tensor:
        """Read a Hugging Face tensor in its stored dtype; a view of the file where it is one whole piece."""
        parts = self.parts[name]
        if len(parts) == 1 and parts[0][2].is_whole:
            return self._piece(*parts[0])
        out = torch.empty(self.specs[name].shape, dtype=self.specs[name].dtype)
        for megatron, number, piece, indices in parts:
            piece.view(out, indices, self.model).copy_(self._piece(megatron, number, piece, indices))
        return out

    def _piece(self, megatron: str, number: int, piece: Piece, indices: Mapping[str, int]) -> Tensor:
        key, index, _ = checkpoint_key(megatron, self.model)
        rule, _ = find_rule(megatron, self.model)
        values = rule.layout.split(self.reader.read(key, index), self.model)[number]
        values = values[: self.model.vocab_size] if piece.axes[0] == "vocab" else values
        adapter = f"adapters.{piece.name.format(**indices).removesuffix('.weight')}"
        if self.lora is None or f"{adapter}.lora_A.weight" not in self.reader.specs:
            return values
        a, b = (self.reader.read(f"{adapter}.lora_{half}.weight").float() for half in "AB")
        merged = torch.empty_like(values)
        band = max(1, MERGED_AT_ONCE // values.shape[1])  # rows merged at once, which keeps fp32 copies small
        for first in range(0, len(values), band):
            rows = slice(first, first + band)
            merged[rows] = values[rows].float() + self.lora.alpha / self.lora.rank * (b[rows] @ a)
        return merged

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (PEFT name, tensor) of each adapter weight."""
        for key in self.reader.specs:
            if key.startswith("adapters."):
                yield key.removeprefix("adapters."), self.reader.read(key)


Part = tuple[str, int, Piece, Mapping[str, int]]  # Megatron name, number of the piece, piece, layer and expert


def _parts(model: ModelConfig) -> dict[str, list[Part]]:
    """Return {Hugging Face name: the Megatron pieces it consists of}, in model order."""
    parts: dict[str, list[Part]] = {}
    for megatron in whole_names(model):
        rule, indices = find_rule(megatron, model)
        if not rule.copy:
            for number, piece in enumerate(rule.pieces):
                parts.setdefault(piece.name.format(**indices), []).append((megatron, number, piece, dict(indices)))
    return parts
