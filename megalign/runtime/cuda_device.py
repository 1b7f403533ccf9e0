"""Chooses a rank's CUDA device, and refuses one that another rank has too."""

from __future__ import annotations

import socket

import torch
import torch.distributed as dist

from megalign.schema import UserError

ON_CPU = "(CUDA_VISIBLE_DEVICES= runs the job on the CPU)"


def cuda_device(local_rank: int | None, size: int, ranks_here: int | None) -> torch.device:
    """Return the CUDA device of a local rank, or the only one that this process sees.

    local_rank, ranks_here: as the launcher says them; None where it does not. size: of the job.
    """
    count = torch.cuda.device_count()
    if size > 1 and count > 1 and local_rank is None:
        raise UserError(f"LOCAL_RANK is missing: WORLD_SIZE is {size}; must be the CUDA device of this process")
    index = local_rank or 0
    if count > 1 and index >= count:
        raise UserError(
            f"LOCAL_RANK is {index}: this machine has {count} CUDA devices for {ranks_here or index + 1} ranks; must "
            f"be one for each {ON_CPU}"
        )
    return torch.device("cuda", index if count > 1 else 0)  # Slurm may show each task its own device alone


def refuse_shared_device(store: dist.Store, rank: int, device: torch.device) -> None:
    """Raise UserError where another rank has this device too: NCCL would fail there without saying why."""
    name = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if name is None:  # torch before 2.5
        return
    ranks = store.add(f"device {socket.gethostname()} {name}", 1)
    if ranks > 1:
        seen = torch.cuda.device_count()
        raise UserError(
            f"rank {rank}: {ranks} ranks of this machine for one CUDA device, of {seen} that this rank sees; must be "
            f"one for each {ON_CPU}"
        )
