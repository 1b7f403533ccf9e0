"""Megatron's process groups as one plain value; the only file that touches `parallel_state`."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state


@dataclass(frozen=True, slots=True)
class Groups:
    """This rank's place on every parallel axis, and the groups to speak to its neighbours in.

    Context ranks hold parts of the same sequences, data ranks other sequences. Experts are cut over `expert` alone,
    whose ranks are taken from tensor, context and data ranks of one stage.
    """

    tensor_rank: int
    tensor_size: int
    tensor: dist.ProcessGroup
    pipeline_rank: int
    pipeline_size: int
    pipeline: dist.ProcessGroup
    virtual_size: int  # model chunks of a pipeline rank
    context_rank: int
    context_size: int
    context: dist.ProcessGroup
    data_rank: int
    data_size: int
    data: dist.ProcessGroup
    data_context: dist.ProcessGroup  # ranks that hold the same weights outside experts, and reduce their gradients
    expert_rank: int
    expert_size: int
    expert: dist.ProcessGroup
    expert_data: dist.ProcessGroup  # ranks that hold the same experts

    @property
    def first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1


def make_groups(
    *, tensor: int, pipeline: int, timeout_s: float, virtual: int = 1, context: int = 1, expert: int = 1
) -> Groups:
    """Create the job's groups; data ranks are what is left of the world. Called on every rank; earlier groups end."""
    if parallel_state.model_parallel_is_initialized():
        _end_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=1,
        # Declared a whole number, used in a timedelta, which takes any.
        distributed_timeout_minutes=timeout_s / 60,
        create_gloo_process_groups=dist.get_backend() != "gloo",
    )
    return Groups(
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        virtual_size=virtual,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        context=parallel_state.get_context_parallel_group(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        data=parallel_state.get_data_parallel_group(),
        data_context=parallel_state.get_data_parallel_group(with_context_parallel=True),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_size=parallel_state.get_expert_model_parallel_world_size(),
        expert=parallel_state.get_expert_model_parallel_group(),
        expert_data=parallel_state.get_expert_data_parallel_group(),
    )


def _end_groups() -> None:
    """Let go of the groups there are, once no rank waits in one: gloo's have threads that wake up all the time."""
    dist.barrier()
    for group in parallel_state._global_process_group_list or ():
        if group not in (None, dist.GroupMember.NON_GROUP_MEMBER):
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    gc.collect()  # engines that hold them are full of cycles
