"""Reads and writes this rank's part of the weights and optimizer state inside an initialised DeepSpeed engine.

Each parameter's values lie in one flat fp32 tensor of this rank, the master weights of its optimizer group, as far as
this rank's ZeRO partition owns them. The optimizer's state is kept for that flat tensor. Stage 1 in bf16 uses a class
of its own (`BF16_Optimizer`), with other names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megalign.convert.hf.safetensors_file import Spec
from megalign.convert.zero.files import WEIGHT, Fragment
from megalign.engines.deepspeed.policy import shape_of

STATES = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *STATES)
FLAT = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")

Read = Callable[[str, str, int, int], Tensor]  # (name, kind, start, numel) -> values


@dataclass(frozen=True, slots=True)
class Place:
    """Locates this rank's range of a parameter: values `start` on, at `offset` in the flat tensor of its group."""

    name: str
    start: int
    numel: int
    group: int
    offset: int


@dataclass(frozen=True, slots=True)
class _Group:
    """Holds the flat tensor of an optimizer group, and the optimizer that keeps the state for it."""

    flat: Tensor
    inner: Any

    @property
    def state(self) -> dict[str, Any]:
        """Return the optimizer's state."""
        state: dict[str, Any] = self.inner.state[self.flat]
        return state

    def tensor(self, kind: str) -> Tensor:
        """Return the flat tensor of a kind."""
        tensor: Tensor = self.flat if kind == WEIGHT else self.state[kind]
        return tensor.detach()

    def set_step(self, step: int) -> None:
        """Set the number of steps: torch's optimizers keep it in a tensor, DeepSpeed's CPU Adam as a number."""
        if not isinstance(self.inner, torch.optim.Adam):  # AdamW is a subclass
            self.state["step"] = step
            return
        on_device = self.inner.defaults.get("fused") or self.inner.defaults.get("capturable")
        device = self.flat.device if on_device else "cpu"
        self.state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)


def link_in_turn(ds_engine: Any) -> None:
    """Correct what ZeRO-1 and ZeRO-2 note of each parameter's place where ranks take parameters in turn.

    With `round_robin_gradients` the flat tensors have another order than the one that DeepSpeed's notes count in.
    """
    zero = ds_engine.optimizer
    if not getattr(zero, "round_robin_gradients", False) or _stage_3(ds_engine):
        return
    before = zero.bit16_groups
    zero.bit16_groups = zero.round_robin_bit16_groups
    try:
        zero._link_all_hp_params()
    finally:
        zero.bit16_groups = before


def specs_of(names: Mapping[Parameter, str]) -> dict[str, Spec]:
    """Return shape and dtype of each parameter."""
    return {name: Spec(shape_of(parameter), parameter.dtype) for parameter, name in names.items()}


def places(ds_engine: Any, names: Mapping[Parameter, str]) -> Iterator[Place]:
    """Yield the ranges of parameters that this rank owns; none for a parameter that other ranks own."""
    zero = ds_engine.optimizer
    parameter: Any  # DeepSpeed adds attributes to it
    for parameter, name in names.items():
        if hasattr(parameter, "ds_id"):
            group, offset, partition = zero.grad_position[zero.get_param_id(parameter)]
            start = zero._get_param_partition_rank(parameter) * partition
            numel = min(partition, parameter.ds_numel - start)  # the last partitions are padded, even whole ones
        elif (mapping := parameter._hp_mapping) is not None:
            group, offset = mapping.param_group_index, mapping.hp_fragment_address.start
            start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        else:
            continue
        if numel > 0:
            yield Place(name, start, numel, group, offset)


def local_fragments(ds_engine: Any, names: Mapping[Parameter, str]) -> Iterator[Fragment]:
    """Yield what this rank owns: views of the master weights and the optimizer's state, copies of what is on NVMe."""
    groups = _groups(ds_engine)
    for index, inside in _by_group(places(ds_engine, names)):
        with _present(ds_engine, index) as swapped:
            for place in inside:
                tensors = {kind: groups[index].tensor(kind).narrow(0, place.offset, place.numel) for kind in KINDS}
                copies = {kind: tensor.clone() for kind, tensor in tensors.items()} if swapped else tensors
                yield Fragment(place.name, place.start, copies)


def whole_values(ds_engine: Any, names: Mapping[Parameter, str]) -> Callable[[Parameter, str], Tensor]:
    """Return a function (parameter, kind) -> all its values, fp32, from all partitions; call that on every rank."""
    groups, place_of = _groups(ds_engine), {place.name: place for place in places(ds_engine, names)}
    zero = ds_engine.optimizer

    def values(parameter: Parameter, kind: str) -> Tensor:
        shape, place = shape_of(parameter), place_of.get(names[parameter])
        flat = torch.zeros(math.prod(shape), device=ds_engine.device)
        if place is not None:
            with _present(ds_engine, place.group):
                mine = groups[place.group].tensor(kind).narrow(0, place.offset, place.numel)
                flat.narrow(0, place.start, place.numel).copy_(mine)
        dist.all_reduce(flat, group=zero.dp_process_group)
        return flat.view(shape)

    return values


def read_step(ds_engine: Any) -> int:
    """Return the number of steps that the optimizer has taken."""
    return int(max((group.state["step"] for group in _groups(ds_engine)), default=0))


def fill(ds_engine: Any, names: Mapping[Parameter, str], read: Read, *, step: int) -> None:
    """Replace what this rank owns by what `read` returns, without communication; call `weights_follow` after it."""
    if _stage_3(ds_engine):
        # In fp32, the partitions are the master weights; gathered parameters would keep their old values.
        ds_engine.optimizer.checkpoint_event_prologue()
    groups = _groups(ds_engine)
    for index, inside in _by_group(places(ds_engine, names)):
        with _present(ds_engine, index, changed=True):
            for place, kind in itertools.product(inside, KINDS):
                values = read(place.name, kind, place.start, place.numel)
                groups[index].tensor(kind).narrow(0, place.offset, place.numel).copy_(values)
    _set_step(ds_engine, groups, step)


def weights_follow(ds_engine: Any) -> None:
    """Set the weights of the module, on all ranks, to the master weights, as an optimizer step does at its end."""
    zero = ds_engine.optimizer
    if not _stage_3(ds_engine):
        zero.update_lp_params()
        return
    for index in range(len(_groups(ds_engine))):
        with _present(ds_engine, index):
            zero._reassign_or_swap_out_partitioned_parameters(index)
    zero.checkpoint_event_epilogue()


def weights_changed(ds_engine: Any) -> None:
    """Set the master weights to the weights of the module, and the optimizer to its state before the first step."""
    zero = ds_engine.optimizer
    if _stage_3(ds_engine):
        zero.checkpoint_event_prologue()
    groups = _groups(ds_engine)
    for index, group in enumerate(groups):
        with _present(ds_engine, index, changed=True) as swapped, torch.no_grad():
            if swapped:
                group.flat.data.copy_(zero.fp16_partitioned_groups_flat[index])
            for kind in STATES:
                group.tensor(kind).zero_()
    if not any(_swaps(ds_engine, index) for index in range(len(groups))):
        with torch.no_grad():
            zero.refresh_fp32_params()
    _set_step(ds_engine, groups, 0)
    if _stage_3(ds_engine):
        zero.checkpoint_event_epilogue()


def _by_group(found: Iterable[Place]) -> Iterator[tuple[int, list[Place]]]:
    """Group places by the optimizer group that holds them."""
    ordered = sorted(found, key=lambda place: place.group)
    return ((index, list(inside)) for index, inside in itertools.groupby(ordered, key=lambda place: place.group))


@contextmanager
def _present(ds_engine: Any, index: int, *, changed: bool = False) -> Iterator[bool]:
    """Read a group's master weights and state from NVMe for the block, and write them back if `changed`.

    Yields whether they are on NVMe; else nothing is done.
    """
    zero, swapped = ds_engine.optimizer, _swaps(ds_engine, index)
    if swapped:
        zero._optimizer_states_and_gradient_swap_in(index)
    try:
        yield swapped
    finally:
        if swapped and changed:
            zero._optimizer_states_and_gradient_swap_out(index)
        elif swapped:
            zero._release_swap_buffers(index)


def _swaps(ds_engine: Any, index: int) -> bool:
    return bool(_stage_3(ds_engine) and ds_engine.optimizer._swappable_optimizer_subgroup(index))


def _stage_3(ds_engine: Any) -> bool:
    return bool(ds_engine.zero_optimization_stage() == 3)


def _groups(ds_engine: Any) -> list[_Group]:
    """Return the groups; makes the optimizer's state where no step has made it yet."""
    zero = ds_engine.optimizer
    flats = next(getattr(zero, attribute) for attribute in FLAT if hasattr(zero, attribute))
    groups = [_Group(flat, _inner(zero, number)) for number, flat in enumerate(flats)]
    for index, group in enumerate(groups):
        if STATES[0] not in group.state:
            with _present(ds_engine, index, changed=True):
                group.state.update({kind: torch.zeros_like(group.flat.detach()) for kind in STATES})
            group.set_step(0)
    return groups


def _inner(zero: Any, group: int) -> Any:
    """Return the optimizer of a group; with partial offload, there is a second one for the groups on the device."""
    on_cpu = getattr(zero, "subgroup_to_device", {}).get(group, "cpu") == "cpu"
    return zero.optimizer if on_cpu else zero.backup_optimizer


def _set_step(ds_engine: Any, groups: list[_Group], step: int) -> None:
    """Set the number of steps, also in the counter that DeepSpeed's CPU Adam keeps outside of its state."""
    for group in groups:
        group.set_step(step)
    if hasattr(ds_engine.optimizer.optimizer, "ds_opt_adam"):
        _replay(ds_engine.optimizer.optimizer, step)


def _replay(inner: Any, step: int) -> None:
    """Take the past steps of DeepSpeed's CPU Adam on one value.

    It multiplies beta1 and beta2 into running powers, which a jump to a later step would compute with another rounding.
    """
    value, grad, first, second = torch.zeros(4, 1).unbind()
    group = inner.param_groups[0]
    beta1, beta2 = group["betas"]
    for number in range(1, step + 1):
        inner.ds_opt_adam.adam_update(
            inner.opt_id, number, 0.0, beta1, beta2, group["eps"], 0.0, True, value, grad, first, second
        )
