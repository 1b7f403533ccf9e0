"""Lets Megatron-Core run without CUDA; the only file that knows which of its calls assume a GPU.

Megatron's own modules get a stand-in for the name `torch` whose factory functions put CUDA tensors on the CPU and whose
`cuda` namespace is inert; `torch` itself stays as it is for everybody else. Never used where CUDA is available.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

FACTORIES = ("tensor", "as_tensor", "zeros", "zeros_like", "ones", "empty", "empty_like", "full", "arange", "rand")


def import_megatron() -> None:
    """Import Megatron without torch's compiler, which takes a second to import; see `compiled_later`."""
    if torch.cuda.is_available() or "megatron.core" in sys.modules:
        return
    with compiled_later():
        # Its jit module keeps this torch.compile for modules that are imported later.
        importlib.import_module("megatron.core")


@contextlib.contextmanager
def compiled_later() -> Iterator[None]:
    """Have functions that are decorated with `torch.compile` inside the block compiled when they are first called.

    Decorating imports torch's compiler, which takes a second, and a CPU job calls few of these functions or none.
    """
    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:  # a decorator with arguments
            return functools.partial(compile_later, **options)
        compiled = functools.cache(lambda: compile_now(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


def install() -> None:
    """Point every loaded `megatron.core` module at the CPU stand-in; call again after importing more of them."""
    if torch.cuda.is_available():
        return
    stand_in = _torch_without_cuda()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]
    _patch_tensor_methods()
    _patch_rng_tracker()
    _patch_experts()


@functools.cache
def _torch_without_cuda() -> ModuleType:
    stand_in = ModuleType("torch")
    stand_in.__dict__.update(torch.__dict__)
    stand_in.__getattr__ = lambda name: getattr(torch, name)  # type: ignore[method-assign]
    for name in FACTORIES:
        stand_in.__dict__[name] = _on_cpu(getattr(torch, name))
    stand_in.cuda = _inert_cuda()  # type: ignore[attr-defined]
    return stand_in


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if isinstance(device, int) or str(device).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        return factory(*args, **kwargs)

    return make


class _Inert:
    """Stands in for a CUDA stream or event: every method does nothing and returns the object itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., _Inert]:
        return lambda *args, **kwargs: self


@contextlib.contextmanager
def _no_stream(stream: Any) -> Iterator[None]:
    yield


def _inert_cuda() -> ModuleType:
    cuda = ModuleType("torch.cuda")
    cuda.__dict__.update(torch.cuda.__dict__)
    cuda.__getattr__ = lambda name: getattr(torch.cuda, name)  # type: ignore[method-assign]
    nothing = lambda *args, **kwargs: None  # noqa: E731
    cuda.__dict__.update(
        current_device=lambda: torch.device("cpu"),
        synchronize=nothing,
        set_device=nothing,
        empty_cache=nothing,
        manual_seed=nothing,
        Stream=_Inert,
        Event=_Inert,
        current_stream=_Inert,
        default_stream=_Inert,
        stream=_no_stream,
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=nothing,
    )
    return cuda


def _patch_tensor_methods() -> None:
    """Make `Tensor.cuda()` return the tensor, and `Tensor.type()` give Megatron the CUDA names that it expects."""
    if getattr(torch.Tensor.cuda, "megalign_shim", False):
        return
    plain_type = torch.Tensor.type

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain_type(self, *args, **kwargs)
        # DeepSpeed, too, sorts gradients by these names, and would drop those of a CUDA type where there is none.
        for_megatron = sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.")
        return answer.replace("torch.", "torch.cuda.", 1) if for_megatron and isinstance(answer, str) else answer

    cuda.megalign_shim = True  # type: ignore[attr-defined]
    for name, method in (("cuda", cuda), ("type", type_as_on_cuda), ("record_stream", lambda self, stream: None)):
        setattr(torch.Tensor, name, method)


def _patch_rng_tracker() -> None:
    """Make the tracker use CPU generator states; dropout is 0 here, so its forks protect nothing."""
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _patch_experts() -> None:
    """Keep the all-to-all's split sizes on the CPU."""
    dispatcher = sys.modules.get("megatron.core.transformer.moe.token_dispatcher")
    if dispatcher is None:
        return

    def as_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher.maybe_move_tensor_to_cpu = as_numbers  # type: ignore[attr-defined]
