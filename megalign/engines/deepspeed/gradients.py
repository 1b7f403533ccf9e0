"""Reads and clears the gradients that ZeRO has accumulated since the last step; they lie elsewhere at each stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.engines.deepspeed.library import deepspeed
from megalign.engines.deepspeed.policy import shape_of

PIECE = 1 << 18  # elements, 2 MB in float64


def forget(ds: Any) -> None:
    """Drop accumulated gradients, so that the next backward begins a new sum."""
    zero = ds.optimizer
    zero.zero_grad()
    if ds.zero_optimization_stage() == 3:
        # A parameter without a gradient in the coming step would otherwise keep that of the last one.
        zero.grad_partitions_flat_buffer.zero_()
        return
    if _keeps_own_fp32(zero):
        zero.clear_hp_grads()
        return
    zero._release_preflattened_grad_buffers()
    for index in range(len(zero.bit16_groups)):
        zero.averaged_gradients[index] = None
        zero.all_grad_tensors[index] = None
    if zero.cpu_offload:
        zero.micro_step_id = -1
        zero._offload_accumulated_param_ids = set()


def _keeps_own_fp32(zero: Any) -> bool:
    """Tell whether this is stage 1 in bf16, a class of its own that sums fp32 gradients beside bf16 ones."""
    return hasattr(zero, "fp32_groups_gradients")


def sum_over_ranks(ds: Any) -> None:
    """Have ZeRO-3 sum gradients over ranks; the setting `gradient_allreduce_op`, for stages 1 and 2, is not its."""
    if ds.zero_optimization_stage() != 3:
        return
    zero = ds.optimizer
    # It averages over ranks and then multiplies by their number over this.
    zero._gradient_averaging_world_size = lambda params, partition_world_size: 1
    if dist.get_world_size(zero.dp_process_group) == 1:
        # One rank has nothing to sum; the collective would copy every gradient.
        zero._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads = lambda params, dtype: [
            each.grad.view(-1) for each in params
        ]


def sum_in_place(ds: Any) -> None:
    """Have ZeRO add gradients where the optimizer reads them; it would copy them once or twice before a step."""
    zero = ds.optimizer
    if ds.zero_optimization_stage() == 3:
        _read_in_place(zero)
    elif not _keeps_own_fp32(zero) and not zero.cpu_offload:
        # In bf16 it does so; in fp32 it keeps each micro-batch's gradients apart.
        zero._use_compact_grad_partition_buffer = lambda group: True
        if str(zero.device) == "cpu":
            _keep_buffers(zero)


def _read_in_place(zero: Any) -> None:
    """Give ZeRO-3's optimizer the part of the gradients' buffer that is its group's."""
    copied = zero._prepare_fp32_grad_for_sub_group

    def prepare(group: int) -> None:
        buffer, weights = zero.grad_partitions_flat_buffer, zero.fp32_partitioned_groups_flat[group]
        before = sum(each.numel() for each in zero.fp32_partitioned_groups_flat[:group])
        if buffer.dtype != weights.dtype or buffer.device != weights.device:
            copied(group)
            return
        weights.grad = buffer.narrow(0, before, weights.numel())
        zero.averaged_gradients[group] = None

    zero._prepare_fp32_grad_for_sub_group = prepare


def _keep_buffers(zero: Any) -> None:
    """Keep the buffers of ZeRO-1 and ZeRO-2 between steps: a CPU takes longer to map fresh memory than to clear it."""
    build, built = zero._build_compact_grad_partition_buffer, dict[int, Any]()

    def cleared(group: int) -> Any:
        if group in built:
            built[group].flat_partition.zero_()
        else:
            built[group] = build(group)
        return built[group]

    zero._build_compact_grad_partition_buffer = cleared


def norm_in_pieces(ds: Any) -> None:
    """Have ZeRO on a CPU compute the gradient's norm, in float64, piece by piece of what its caches hold."""
    zero = ds.optimizer
    whole = getattr(zero, "get_grad_norm_direct", None)
    if whole is None or _keeps_own_fp32(zero) or str(zero.device) != "cpu":
        return

    def by_piece(held: Sequence[Tensor], parameters: Sequence[Any], norm_type: float = 2) -> Tensor:
        real = [each for each in held if not getattr(each, "_zero_padding", False)]
        pairs = [
            (piece, parameter)
            for each, parameter in zip(real, parameters, strict=False)
            for piece in each.reshape(-1).split(PIECE)
        ]
        total: Tensor = whole([piece for piece, _ in pairs], [parameter for _, parameter in pairs], norm_type)
        return total

    zero.get_grad_norm_direct = by_piece


def reader(ds: Any) -> Callable[[Any], Tensor]:
    """Return the function that gives a parameter's whole gradient, fp32, on every rank; zeros for a frozen one."""
    stage, zero = ds.zero_optimization_stage(), ds.optimizer
    if stage == 3:
        zero.finalize_gradient_accumulation_boundary()

    def read(parameter: Any) -> Tensor:
        if not parameter.requires_grad:
            return torch.zeros(shape_of(parameter), device=parameter.device)
        if stage == 3:
            return deepspeed().utils.safe_get_full_grad(parameter)
        total = torch.zeros(parameter.numel(), device=parameter.device)
        if stage == 1:
            held = parameter._hp_grad if _keeps_own_fp32(zero) else zero.get_gradient_for_reduction(parameter)
            if held is not None:
                total += held.reshape(-1)
        elif parameter._hp_mapping is not None:
            address = parameter._hp_mapping.lp_fragment_address
            total.narrow(0, address.start, address.numel).copy_(_owned(zero, parameter, address.start, address.numel))
        dist.all_reduce(total, group=zero.dp_process_group)
        return total.view_as(parameter)

    return read


def _owned(zero: Any, parameter: Any, start: int, numel: int) -> Tensor:
    """Return the part of a gradient that stage 2 has accumulated on this rank."""
    group, index = zero._get_param_group_idx(parameter), zero.get_param_id(parameter)
    if zero._use_compact_grad_partition_buffer(group):
        rank = dist.get_rank(zero.real_dp_process_group[group])
        compact: Tensor = zero._get_compact_grad_partition_slice(group, rank, index, numel)
        return compact
    if zero.cpu_offload:
        whole = zero.accumulated_grads_in_cpu.get(index)
    else:
        place = next(i for i, each in enumerate(zero.params_in_partition[group]) if each is parameter)
        held = zero.all_grad_tensors.get(group)
        whole = None if held is None else held[place]
    if whole is None:
        return torch.zeros(numel)
    return whole.reshape(-1).narrow(0, start, numel)
