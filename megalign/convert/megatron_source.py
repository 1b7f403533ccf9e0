"""A Megatron checkpoint of ours, read as Hugging Face tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalign.convert.hf_config import read_model_config
from megalign.convert.model_config import ModelConfig
from megalign.convert.naming import megatron_names
from megalign.convert.rules import Piece, find_rule
from megalign.convert.safetensors_file import Spec
from megalign.convert.torch_dist import TorchDistReader, place_of, whole_shape
from megalign.schema import UserError

HF_FILES = "hf"  # in a Megatron checkpoint: what the Hugging Face one had besides weights
MERGED_AT_ONCE = 1 << 24  # values
STATE = ("optimizer.", "adapters.", "rng_state", "rerun_state")  # in a run's checkpoint, beside the model


def whole_names(model: ModelConfig) -> list[str]:
    """All parameters of a model on one rank."""
    return megatron_names(model, layers=range(model.num_layers), first=True, last=True)


def key_specs(specs: Mapping[str, Spec], model: ModelConfig) -> dict[str, Spec]:
    """The tensors of a checkpoint's index, in which layers or experts are stacked."""
    found = {}
    for name, spec in specs.items():
        key, _, counts = place_of(name, model)
        found[key] = Spec((*counts, *spec.shape), spec.dtype)
    return found


@dataclass
class MegatronSource:
    """A Megatron checkpoint of ours, read as Hugging Face tensors; adapters are merged into what they are on.

    Checks when made that every tensor of the model is there in its shape, and nothing else that could be one.
    """

    folder: Path
    model: ModelConfig = field(init=False)
    specs: dict[str, Spec] = field(init=False)  # of the Hugging Face tensors

    def __post_init__(self) -> None:
        config = self.folder / HF_FILES / "config.json"
        if not (self.folder / "metadata.json").is_file() or not config.is_file():
            needed = "a directory with metadata.json and hf/config.json, such as RUN_DIR/checkpoints/step_00000100"
            raise UserError(f"{self.folder} is not a megalign checkpoint; needed: {needed}")
        self.model = read_model_config(self.folder / HF_FILES)
        self.reader = TorchDistReader(self.folder)
        common = self.reader.common()
        if not isinstance(common.get("about"), dict):
            raise UserError(
                f"{self.folder} was not written by megalign; needed: a checkpoint of a run or of hf_to_megatron.py"
            )
        self.lora: dict[str, Any] | None = common["about"].get("lora")
        kinds = {"rank": int, "alpha": int | float, "targets": list | tuple}
        good = self.lora is None or all(isinstance(self.lora.get(key), kind) for key, kind in kinds.items())
        if not good:
            raise UserError(f"{self.folder}/common.pt: about.lora is {self.lora!r}; needed: rank, alpha, targets")
        self.base: str | None = common["about"].get("base")
        if not isinstance(self.base, str | None):
            raise UserError(f"{self.folder}/common.pt: about.base is {self.base!r}; needed: the name of a model")
        self._audit()
        self.parts = _parts(self.model)
        self.specs = {}
        for name, parts in self.parts.items():
            (megatron, _, piece, _), *_ = parts
            dtype = self.reader.specs[place_of(megatron, self.model)[0]].dtype
            self.specs[name] = Spec(piece.stored_shape(self.model), dtype)

    def _audit(self) -> None:
        needed = key_specs(
            {name: Spec(whole_shape(name, self.model), torch.float32) for name in whole_names(self.model)}, self.model
        )
        found = self.reader.specs
        for key, spec in needed.items():
            if key not in found:
                raise UserError(
                    f"{self.folder}: tensor {key} is missing; {self.model.family} (hf/config.json) needs it"
                )
            if found[key].shape != spec.shape:
                shapes = f"has shape {list(found[key].shape)}; hf/config.json asks for {list(spec.shape)}"
                raise UserError(f"{self.folder}: tensor {key} {shapes}")
        extra = [key for key in found if key not in needed and not key.startswith(STATE)]
        if extra:
            raise UserError(f"{self.folder}: tensor {extra[0]} has no place in this {self.model.family} model")

    def tensor(self, name: str) -> Tensor:
        """A Hugging Face tensor in its stored dtype; a view of the file where it is one piece of one tensor."""
        parts = self.parts[name]
        if len(parts) == 1 and parts[0][2].is_whole:
            return self._piece(*parts[0])
        out = torch.empty(self.specs[name].shape, dtype=self.specs[name].dtype)
        for megatron, number, piece, place in parts:
            piece.view(out, place, self.model).copy_(self._piece(megatron, number, piece, place))
        return out

    def _piece(self, megatron: str, number: int, piece: Piece, place: Mapping[str, int]) -> Tensor:
        key, index, _ = place_of(megatron, self.model)
        rule, _ = find_rule(megatron, self.model)
        found = rule.layout.split(self.reader.read(key, index), self.model)[number]
        found = found[: self.model.vocab_size] if piece.axes[0] == "vocab" else found
        adapter = f"adapters.{piece.name.format(**place).removesuffix('.weight')}"
        if self.lora is None or f"{adapter}.lora_A.weight" not in self.reader.specs:
            return found
        a, b = (self.reader.read(f"{adapter}.lora_{one}.weight").float() for one in "AB")
        merged = torch.empty_like(found)
        band = max(1, MERGED_AT_ONCE // found.shape[1])  # rows, so that fp32 copies stay small
        for first in range(0, len(found), band):
            rows = slice(first, first + band)
            merged[rows] = found[rows].float() + self.lora["alpha"] / self.lora["rank"] * (b[rows] @ a)
        return merged

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        """(PEFT's name, values) of each adapter."""
        for key in self.reader.specs:
            if key.startswith("adapters."):
                yield key.removeprefix("adapters."), self.reader.read(key)


Part = tuple[str, int, Piece, Mapping[str, int]]  # Megatron tensor, which of its pieces, that piece, its numbers


def _parts(model: ModelConfig) -> dict[str, list[Part]]:
    """What each Hugging Face tensor is made of, in the order of the model."""
    parts: dict[str, list[Part]] = {}
    for megatron in whole_names(model):
        rule, place = find_rule(megatron, model)
        if not rule.copy:
            for number, piece in enumerate(rule.pieces):
                parts.setdefault(piece.name.format(**place), []).append((megatron, number, piece, dict(place)))
    return parts
