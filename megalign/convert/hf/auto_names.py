"""Converts between the tensors of any decoder of transformers and those of its checkpoints, by transformers' rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from megalign.convert.hf.safetensors_file import Spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Names tensors that are converted together: those of a checkpoint, and those of the model."""

    stored: tuple[str, ...]
    module: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Placed:
    """Holds where each tensor of a checkpoint goes, by names alone."""

    groups: Mapping[str, tuple[str, ...]]  # by the first module tensor it makes: stored tensors, in their order
    copies: Mapping[str, str]  # stored tensors that repeat a tensor the model shares: that tensor's first name
    unknown: tuple[str, ...]  # stored tensors that the model lacks


class AutoNames:
    """Converts between a model's tensors and those of its published checkpoint.

    A model's tensors are its parameters and persistent buffers; one that several names share counts once, and `shared`
    gives {other name: first name}. `model` only gives names, shapes and settings: it belongs on the meta device, and
    what is converted may be there, too. `groups` lists what is converted together when writing, in model order, and
    `specs` the names, shapes and dtypes of the whole checkpoint.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # Imported here: transformers takes seconds, and not every job needs it.
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

        self.model = model
        self.tensors, self.shared = _distinct_tensors(model)
        self.state = model.state_dict()
        transforms = get_model_conversion_mapping(model)
        self.renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self.by_pattern = {pattern: entry for entry in self.converters for pattern in entry.source_patterns}
        # `revert_weight_conversion` undoes these, as for a model that was not loaded from a checkpoint.
        written = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [entry for entry in written if not isinstance(entry, PrefixChange)]
        self.groups: list[TensorGroup] = []
        self.specs: dict[str, Spec] = {}
        for module in self._written_together():
            made = self.to_checkpoint({name: self.tensors[name].detach() for name in module})
            self.groups.append(TensorGroup(tuple(made), module))
            self.specs |= {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()}

    def _written_together(self) -> list[tuple[str, ...]]:
        """Group the model's tensors as `revert_weight_conversion` collects them."""
        from transformers.core_model_loading import WeightConverter, apply_converters

        reverse = [entry.reverse_transform() for entry in reversed(self.model._weight_conversions)]
        converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
        together: dict[str, list[str]] = {}
        for name in self.tensors:
            made, pattern = apply_converters(name, converters)
            together.setdefault(f"converted {made}" if pattern is not None else name, []).append(name)
        return [tuple(names) for names in together.values()]

    def to_checkpoint(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert whole groups of module tensors to those of the checkpoint; may return views of them."""
        from transformers.core_model_loading import revert_weight_conversion

        made: dict[str, Tensor] = revert_weight_conversion(self.model, dict(tensors))
        return made

    def place(self, stored: Iterable[str]) -> Placed:
        """Find the module tensor that each tensor of a checkpoint makes alone or with others.

        Takes the published layout and every other one that transformers reads.
        """
        from transformers.core_model_loading import dot_natural_key

        groups: dict[str, list[str]] = {}
        shared: dict[str, str] = {}
        unknown = []
        for name in sorted(stored, key=dot_natural_key):  # experts in the order of their numbers
            target, _ = self._target(name)
            if target in self.shared:
                shared[name] = self.shared[target]
            elif target in self.tensors:
                groups.setdefault(target, []).append(name)
            else:
                unknown.append(name)
        for name, first in list(shared.items()):
            if first not in groups:  # stored under its other name only
                groups[first] = [name]
                del shared[name]
        return Placed({target: tuple(names) for target, names in groups.items()}, shared, tuple(unknown))

    def _target(self, stored: str) -> tuple[str, str | None]:
        """Return (first module tensor that a stored tensor makes, source pattern of its converter if it has one)."""
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(stored, self.renamings, self.converters, prefix, self.state)
        if target not in self.state and stored in self.state:
            target, pattern = rename_source_key(stored, [], [], prefix, self.state)
        return target, pattern

    def converts(self, stored: str) -> bool:
        """Return whether a stored tensor becomes others by more than a change of name."""
        return self._target(stored)[1] is not None

    def from_checkpoint(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the stored tensors of one group, in the group's order, to module tensors in the stored dtype."""
        first = next(iter(stored))
        target, pattern = self._target(first)
        if pattern is None:
            return {self.shared.get(target, target): stored[first]}
        converter = deepcopy(self.by_pattern[pattern])
        for name, tensor in stored.items():
            converter.add_tensor(target, name, self._target(name)[1], tensor)
        made = converter.convert(target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _distinct_tensors(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return ({name: tensor}, {other name: first name}) of a model's parameters and persistent buffers."""
    state = model.state_dict(keep_vars=True)
    unsaved, tied = model._keys_to_ignore_on_save or (), model.all_tied_weights_keys
    first: dict[int, str] = {}
    for name in sorted(state, key=lambda name: name in tied):  # keeps the model's order otherwise
        first.setdefault(id(state[name]), name)
    names = {name: first[id(tensor)] for name, tensor in state.items()}
    tensors = {name: state[name] for name in state if names[name] == name and name not in unsaved}
    return tensors, {name: other for name, other in names.items() if other != name}
