"""Which CUDA device a rank takes, and what is said where there are too few."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megalign.runtime.cuda_device import cuda_device, refuse_shared_device
from megalign.schema import UserError


@pytest.mark.parametrize(
    ("devices", "local_rank", "index"),
    [(8, 5, 5), (1, 0, 0), (1, 3, 0), (1, None, 0)],  # a task of Slurm may see its own device alone
)
def test_a_rank_takes_its_own_device(monkeypatch, devices, local_rank, index):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    assert cuda_device(local_rank, 8, None) == torch.device("cuda", index)


def test_more_ranks_than_devices_names_both_numbers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="LOCAL_RANK is 6: this machine has 4 CUDA devices for 8 ranks; must be one"):
        cuda_device(6, 8, 8)
    with pytest.raises(UserError, match="LOCAL_RANK is missing: WORLD_SIZE is 8"):
        cuda_device(None, 8, None)


def test_ranks_that_see_one_device_are_refused_unless_it_is_another_for_each(monkeypatch):
    store = dist.HashStore()
    names = iter(["GPU-1", "GPU-2", "GPU-1"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=next(names)))
    device = torch.device("cuda", 0)
    refuse_shared_device(store, 0, device)
    refuse_shared_device(store, 1, device)
    with pytest.raises(UserError, match="rank 2: 2 ranks of this machine for one CUDA device, of 1 that this rank"):
        refuse_shared_device(store, 2, device)
