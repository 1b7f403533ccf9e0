"""The stand-in that Megatron-Core sees for torch where there is no CUDA."""

from __future__ import annotations

import sys

import megatron.core.parallel_state
import pytest
import torch

from megalign.runtime import cpu_shims

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="never used where CUDA is available")


def test_only_megatron_sees_the_stand_in():
    cpu_shims.install()
    seen = megatron.core.parallel_state.torch
    assert seen is not torch and sys.modules["torch"] is torch
    assert seen.zeros(2, device="cuda:1").device.type == "cpu"
    assert seen.empty(2, device=0).device.type == "cpu"
    assert seen.tensor([1.0], device=seen.cuda.current_device()).device.type == "cpu"
    assert seen.ones(2, device="meta").device.type == "meta"
    assert seen.nn.Linear is torch.nn.Linear and seen.float32 is torch.float32
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


def test_streams_and_events_do_nothing():
    cpu_shims.install()
    cuda = megatron.core.parallel_state.torch.cuda
    stream, event = cuda.Stream(priority=-1), cuda.Event(enable_timing=True)
    with cuda.stream(stream):
        event.record(stream)
        stream.wait_event(event)
        cuda.current_stream().synchronize()
    torch.ones(1).record_stream(stream)


def test_installing_twice_changes_nothing_more():
    cpu_shims.install()
    seen, plain_cuda, plain_type = megatron.core.parallel_state.torch, torch.Tensor.cuda, torch.Tensor.type
    cpu_shims.install()
    assert megatron.core.parallel_state.torch is seen
    assert torch.Tensor.cuda is plain_cuda and torch.Tensor.type is plain_type


def test_tensor_types_are_what_megatron_compares_on_a_gpu():
    cpu_shims.install()
    value = torch.ones(1)
    assert value.cuda() is value
    as_megatron = {"__name__": "megatron.core.optimizer", "value": value}
    assert eval("value.type()", as_megatron) == "torch.cuda.FloatTensor"
    assert value.type() == "torch.FloatTensor", "others, DeepSpeed among them, see what the tensor is"
    assert value.type(torch.float64).dtype == torch.float64
