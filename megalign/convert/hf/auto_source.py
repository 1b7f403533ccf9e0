"""Checks and reads a checkpoint of any decoder of transformers, as the tensors of transformers' own model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megalign.convert.hf.auto_model import meta_model
from megalign.convert.hf.auto_names import AutoNames, TensorGroup
from megalign.convert.hf.model import HFModel
from megalign.convert.hf.reader import check_tied_copy, checked_dtype, family_ignores
from megalign.convert.hf.weight_files import StoredFiles
from megalign.schema import UserError


class AutoSource:
    """Reads a checkpoint's tensors lazily, dequantised, and converts them to those of transformers' model.

    The constructor checks, from the headers alone, that each tensor the model needs is there in its shape, and that
    there are no others except those that its class or our tables ignore. `groups` lists what there is to read;
    `absent` lists the model's tensors that its class lets a checkpoint lack, which keep their initial values.
    """

    def __init__(self, source: HFModel, names: AutoNames) -> None:
        self.names = names
        self.stored = StoredFiles(source.folder)
        self.placed = names.place(self.stored.files)
        _refuse_unknown(source, self.stored, names, self.placed.unknown)
        self.groups = [self._checked(target, stored) for target, stored in self.placed.groups.items()]
        made = {name for group in self.groups for name in group.module}
        self.absent = self._absent([name for name in names.tensors if name not in made])
        for name, first in self.placed.copies.items():
            self._check(name, names.tensors[first])

    def read(self, group: TensorGroup) -> dict[str, Tensor]:
        """Return {module tensor: value} of a group, in the stored dtype; may be views of the mapped files."""
        values = self.names.from_checkpoint({name: self.stored.tensor(name) for name in group.stored})
        for name, first in self.placed.copies.items():
            if first in values:
                copy = (name, self.stored.tensor(name))
                check_tied_copy(self.stored.files[name], (group.stored[0], values[first]), copy)
        return values

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, value) of the module tensors, one group in memory at a time."""
        for group in self.groups:
            yield from self.read(group).items()

    def close(self) -> None:
        """Close the files."""
        self.stored.close()

    def _checked(self, target: str, stored: tuple[str, ...]) -> TensorGroup:
        """Convert the headers of a group, and return it with what it makes; UserError where that does not fit."""
        needed = self.names.tensors
        if len(stored) == 1 and not self.names.converts(stored[0]):
            self._check(stored[0], needed[target])
            return TensorGroup(stored, (target,))
        described = {name: self.stored.describe(name)[0] for name in stored}
        for name, shape in described.items():
            checked_dtype(self.stored, name, shape)
        try:
            made = self.names.from_checkpoint(
                {name: torch.empty(shape, device="meta") for name, shape in described.items()}
            )
        except (RuntimeError, ValueError, IndexError):  # tensors that cannot be stacked, joined or split
            made = {}
        if not made or any(name not in needed or made[name].shape != needed[name].shape for name in made):
            self._refuse_misfit(target, stored)
        return TensorGroup(stored, tuple(made))

    def _check(self, stored: str, tensor: Tensor) -> None:
        """Check the shape of a stored tensor, and its dtype where it is no table of whole numbers."""
        shape = tuple(tensor.shape)
        if tensor.is_floating_point() or self.stored.describe(stored) != (shape, tensor.dtype):
            checked_dtype(self.stored, stored, shape)

    def _refuse_misfit(self, target: str, stored: tuple[str, ...]) -> None:
        """Raise UserError for stored tensors that together do not make what the model has."""
        published = next(group.stored for group in self.names.groups if target in group.module)
        self._refuse_missing([name for name in published if name not in self.stored.files])
        for name in stored:
            if name in self.names.specs:
                checked_dtype(self.stored, name, self.names.specs[name].shape)
        shapes = [list(self.stored.describe(name)[0]) for name in stored[:1]]
        raise UserError(
            f"{self.stored.files[stored[0]]}: tensor {stored[0]} of shape {shapes[0]} does not make {target} of shape "
            f"{list(self.names.tensors[target].shape)}; config.json asks for that"
        )

    def _refuse_missing(self, names: list[str]) -> None:
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            kind = type(self.names.model).__name__
            raise UserError(f"{self.stored.folder}: tensor {names[0]} is missing{more}; {kind} (config.json) needs it")

    def _absent(self, left: list[str]) -> tuple[str, ...]:
        """Return the tensors among `left` that may be missing; UserError where others are."""
        optional = self.names.model._keys_to_ignore_on_load_missing or ()
        needed = {name for name in left if not any(re.search(pattern, name) for pattern in optional)}
        stored = [name for group in self.names.groups if needed & set(group.module) for name in group.stored]
        self._refuse_missing([name for name in stored if name not in self.stored.files] or stored)
        return tuple(left)


def _refuse_unknown(source: HFModel, stored: StoredFiles, names: AutoNames, unknown: tuple[str, ...]) -> None:
    """Raise UserError for tensors that the model lacks, and that transformers would not ignore either."""
    model = names.model
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *family_ignores(source.config)]
    # Tables that older versions stored and newer ones compute, by whatever name the module has now.
    for ending in ("rotary_emb.inv_freq", "position_ids"):
        if any(name.endswith(ending) for name, _ in model.named_buffers()):
            ignored.append(rf"(^|\.){re.escape(ending)}$")
    for name in unknown:
        if not any(re.search(pattern, name) for pattern in ignored):
            raise UserError(
                f"{stored.files[name]}: tensor {name} has no place in this {type(model).__name__} (config.json)"
            )


def check_auto_weights(source: HFModel) -> dict[str, Path]:
    """Check a checkpoint of any family as `AutoSource` does, and return the file of each tensor."""
    reader = AutoSource(source, AutoNames(meta_model(source.folder)))
    try:
        return dict(reader.stored.files)
    finally:
        reader.close()
