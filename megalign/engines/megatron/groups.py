"""Creates Megatron's process groups and returns them as one value; only this file uses `parallel_state`."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state

from megalign.config.layout import Layout


@dataclass(frozen=True, slots=True)
class Groups:
    """Holds this rank's index on every parallel axis, and the process group of each.

    Context ranks hold parts of the same sequences, data ranks other sequences. Experts are sharded over `expert`
    alone, whose ranks are taken from tensor, context and data ranks of one stage.
    """

    layout: Layout
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
        """Tell whether this rank has the embedding."""
        return self.pipeline_rank == 0

    @property
    def last_stage(self) -> bool:
        """Tell whether this rank has the head."""
        return self.pipeline_rank == self.pipeline_size - 1


def make_groups(layout: Layout, *, timeout_s: float) -> Groups:
    """Create the job's groups, with all remaining ranks as data ranks; destroys earlier ones. Call on every rank."""
    if parallel_state.model_parallel_is_initialized():
        _end_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
        # Annotated as int, but passed to a timedelta, which takes fractions.
        distributed_timeout_minutes=timeout_s / 60,
        create_gloo_process_groups=dist.get_backend() != "gloo",
    )
    return Groups(
        layout=layout,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        virtual_size=layout.virtual_pipeline,
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
    """Destroy all groups once no rank waits in one: the threads of gloo's groups keep waking up."""
    dist.barrier()
    for group in parallel_state._global_process_group_list or ():
        if group not in (None, dist.GroupMember.NON_GROUP_MEMBER):
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    gc.collect()  # engines hold them in reference cycles
