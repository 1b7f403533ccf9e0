"""A CUDA device that is not there: tensors that say they are on cuda:0 and compute their true values on the CPU.

`install()` in a process of its own. From then on code behind `is_cuda` runs; an operator that mixes such tensors with
CPU ones raises, as it does on CUDA; `WAITS` counts where the host waits for the device. Kernels that a CPU has not, or
that do other checks or other rounding on CUDA, are in `kernels`. Nothing here tells of speed, memory, NCCL or the
numerics of real kernels.
"""

from __future__ import annotations

import collections
import contextlib
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo.trace_rules
import torch.distributed as dist
import torch.utils._device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
DEVICES = 8
WAITS: collections.Counter[str] = collections.Counter()  # by line of code
EMULATED: dict[Any, Callable[..., Any]] = {}  # operator -> what computes it here; `kernels` fills it
FUNCTIONS: dict[Any, Callable[..., Any]] = {}  # likewise for functions of torch's Python interface

aten = torch.ops.aten
_DEVICE, _SET_DATA = torch.Tensor.device.__get__, torch.Tensor.data.__set__  # type: ignore[attr-defined]
_IS_CUDA, _IS_CPU = torch.Tensor.is_cuda.__get__, torch.Tensor.is_cpu.__get__  # type: ignore[attr-defined]
# Operators that take CPU indices, or that are the copy between devices itself.
MIXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
MIXED |= {aten.copy_.default}
SAME_TENSOR = {"resize_", "set_", "t_", "squeeze_", "unsqueeze_", "transpose_"}


class Pretend(torch.Tensor):
    """Wraps a CPU tensor, `inner`, as a tensor of the pretended device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretend:
        one = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("cpu"),
            requires_grad=False,
        )
        one.inner = inner
        return one

    def __repr__(self, **_: Any) -> str:
        return f"Pretend({self.inner})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        special = _SPECIAL.get(func)
        if special is not None:
            return special(*args, **kwargs)
        if func in FUNCTIONS:
            return FUNCTIONS[func](*args, **kwargs)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CUDA
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stand in for `Tensor.to` with a tensor of the device as receiver or as the other tensor."""
    if not isinstance(tensor, Pretend):
        return tensor.to(device=CUDA, dtype=args[0].dtype)
    if args and isinstance(args[0], torch.Tensor):
        device, dtype, non_blocking, copy = args[0].device, args[0].dtype, False, False
    else:
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and device.type == "cpu":
        return _cpu(tensor, dtype, waits=not non_blocking)
    if dtype is None or dtype == tensor.dtype:
        return tensor.clone() if copy else tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.to(dtype)


def _cpu(tensor: Pretend, dtype: torch.dtype | None = None, *, waits: bool = True) -> Tensor:
    WAITS[_where()] += waits
    got = _ToCpu.apply(tensor)
    return got if dtype is None else got.to(dtype)


class _ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Pretend) -> Tensor:
        return tensor.inner.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] if isinstance(grads[0], Pretend) else Pretend(grads[0])


def _tolist(tensor: Pretend) -> list[Any]:
    WAITS[_where()] += 1
    return tensor.inner.detach().tolist()


def _no_numpy(tensor: Pretend, **_: Any) -> None:
    raise TypeError("can't convert cuda:0 device type tensor to numpy")


def _set_data(tensor: Tensor, data: Tensor) -> None:
    if isinstance(tensor, Pretend):
        tensor.inner = data.inner  # type: ignore[attr-defined]
    with torch._C.DisableTorchFunctionSubclass():
        _SET_DATA(tensor, data)


def _type(tensor: Pretend, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs:
        return _to(tensor, *args, **kwargs)
    return tensor.inner.type().replace("torch.", "torch.cuda.", 1)


def _backward(tensor: Tensor, gradient: Any = None, *arguments: Any, **options: Any) -> None:
    torch.autograd.backward(tensor, gradient, *arguments, **options)


_SPECIAL: dict[Any, Callable[..., Any]] = {
    _DEVICE: lambda tensor: CUDA,
    _IS_CUDA: lambda tensor: True,
    _IS_CPU: lambda tensor: False,
    _SET_DATA: _set_data,
    torch.Tensor.get_device: lambda tensor: 0,
    torch.Tensor.backward: _backward,
    torch.Tensor.cuda: lambda tensor, *args, **kwargs: tensor,
    torch.Tensor.to: _to,
    torch.Tensor.cpu: lambda tensor: _cpu(tensor),
    torch.Tensor.tolist: _tolist,
    torch.Tensor.numpy: _no_numpy,
    torch.Tensor.type: _type,
    torch.Tensor.data_ptr: lambda tensor: tensor.inner.data_ptr(),
    torch.Tensor.record_stream: lambda tensor, stream: None,
    torch.Tensor.untyped_storage: lambda tensor: tensor.inner.untyped_storage(),
}


def _where() -> str:
    """Return the innermost line of this project or of Megatron on the stack."""
    for frame in reversed(traceback.extract_stack()):
        if "/tests/" not in frame.filename and ("/megalign/" in frame.filename or "/megatron/core/" in frame.filename):
            return (
                f"{frame.filename.split('site-packages/')[-1].split('/megalign/', 1)[-1]}:{frame.lineno} {frame.line}"
            )
    return "elsewhere"


def _is_cuda(device: Any) -> bool:
    return device is not None and (isinstance(device, int) or torch.device(device).type == "cuda")


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Check an operator's devices, count its waits, and compute it on the CPU."""
    flat = tree_leaves((args, kwargs))
    there = [leaf for leaf in flat if isinstance(leaf, Pretend)]
    name, to = func._schema.name, kwargs.get("device")
    if there and func not in MIXED and not name.startswith("c10d"):
        here = [
            leaf for leaf in flat if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Pretend) and leaf.dim()
        ]
        if here:
            raise RuntimeError(
                f"{name}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                f"cpu, of shapes {[tuple(leaf.shape) for leaf in here]}"
            )
    if _waits(func, name, args, kwargs, bool(there)):
        WAITS[_where()] += 1
    plain_args, plain_kwargs = tree_map(_inner, args), tree_map(_inner, kwargs)
    if _is_cuda(to):
        plain_kwargs["device"] = torch.device("cpu")
    if plain_kwargs.get("pin_memory"):
        plain_kwargs["pin_memory"] = False
    emulated = EMULATED.get(func) if there or _is_cuda(to) else None
    out = (emulated or func)(*plain_args, **plain_kwargs)
    if name.startswith("c10d"):  # which return what they were given
        given = {id(inner): outer for inner, outer in zip(tree_leaves(plain_args), tree_leaves(args), strict=True)}
        return tree_map(lambda leaf: given.get(id(leaf), leaf), out)
    if func is aten._local_scalar_dense.default or not (there or _is_cuda(to)):
        return out
    if name.split("::")[1] in SAME_TENSOR and isinstance(args[0], Pretend):
        return args[0]
    made = tree_map(lambda leaf: Pretend(leaf) if _is_plain(leaf) else leaf, out)
    return return_and_correct_aliasing(func, args, kwargs, made)


def _waits(func: Any, name: str, args: Any, kwargs: Any, there: bool) -> bool:
    """Tell whether the host waits for the device in an operator: a read of a value, a blocking copy, a data size."""
    if name in ("aten::_to_copy", "aten::copy_"):
        into = name == "aten::copy_"
        source = isinstance(args[1] if into else args[0], Pretend)
        to = kwargs.get("device")
        # A copy to the CPU comes by Python's `to`; here autograd means the device of the wrapper, which says `cpu`.
        target = isinstance(args[0], Pretend) if into else source or _is_cuda(to)
        blocking = not (kwargs.get("non_blocking") or (into and len(args) > 2 and args[2]))
        return source != target and blocking
    if not there:
        return False
    masked = func is aten.index.Tensor and any(getattr(index, "dtype", None) == torch.bool for index in args[1])
    sized = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default)
    counted = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
    return masked or counted or func in sized


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, Pretend) else leaf


def _is_plain(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and not isinstance(leaf, Pretend)


class _Operators(TorchDispatchMode):
    """Catches operators that have no tensor of the device among their arguments, such as factories."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Names(torch.overrides.TorchFunctionMode):
    """Gives every CUDA device the one name `cuda:0`, before torch tries to use it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CUDA
        named = func is torch.Tensor.to and len(args) > 1 and not isinstance(args[1], torch.Tensor | torch.dtype)
        if named and _is_cuda(args[1]):
            args = (args[0], CUDA, *args[2:])
        return func(*args, **kwargs)


class _Inert:
    """Stands in for a stream or an event: every method does nothing, but the host waits in `synchronize`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self

    def synchronize(self) -> None:
        WAITS[_where()] += 1

    def __enter__(self) -> _Inert:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def install() -> None:
    """Make this process believe in CUDA devices; for the rest of its life, before it has done anything with torch."""
    torch._dynamo.trace_rules.get_torch_obj_rule_map()  # asks for CUDA's modules while they are still torch's own
    torch.utils._device._device_constructors()  # `with torch.device(...)` knows the factories by what they are now
    from tests.gpu_pretended import kernels

    EMULATED.update(kernels.OPERATORS)
    FUNCTIONS.update(kernels.FUNCTIONS)
    torch.compile = lambda function=None, **options: function if function is not None else (lambda each: each)
    _patch_cuda()
    _patch_modules()
    _patch_factories()
    _patch_groups()
    kind = torch.autograd.function.BackwardCFunction
    plain = kind.apply

    def apply(self: Any, *grads: Any) -> Any:  # autograd's own thread has torch functions of subclasses off
        with torch._C._EnableTorchFunction():
            return plain(self, *grads)

    kind.apply = apply
    _Names().__enter__()
    _Operators().__enter__()


def _patch_cuda() -> None:
    nothing: Callable[..., None] = lambda *args, **kwargs: None  # noqa: E731
    properties = types.SimpleNamespace(
        major=9, minor=0, name="pretended", multi_processor_count=132, total_memory=80 << 30
    )
    values: dict[str, Any] = {name: nothing for name in ("set_device", "init", "_lazy_init", "synchronize")}
    values |= {name: nothing for name in ("empty_cache", "manual_seed", "manual_seed_all", "set_rng_state")}
    values |= {
        "reset_peak_memory_stats": nothing,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: DEVICES,
        "current_device": lambda: 0,
        "Stream": _Inert,
        "Event": _Inert,
        "current_stream": lambda *args: _Inert(),
        "default_stream": lambda *args: _Inert(),
        "stream": lambda stream: contextlib.nullcontext(),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "max_memory_allocated": lambda *args: 0,
        "memory_allocated": lambda *args: 0,
        "mem_get_info": lambda *args: (80 << 30, 80 << 30),
        "is_current_stream_capturing": lambda: False,
        "get_device_name": lambda *args: "pretended",
        "get_device_capability": lambda *args: (9, 0),
        "get_device_properties": lambda *args: properties,
        "default_generators": tuple(torch.Generator() for _ in range(DEVICES)),
    }
    for name, value in values.items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = values["get_rng_state"]
    torch.cuda.random.set_rng_state = nothing
    torch.backends.cuda.is_flash_attention_available = lambda: True
    torch.Tensor.pin_memory = lambda self, *args: self
    torch.cuda.nccl.version = lambda: (2, 27, 5)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self if isinstance(self, Pretend) else self.to(CUDA)


def _patch_groups() -> None:
    """Let gloo stand in for NCCL, which is not there."""
    join = dist.init_process_group

    def init_process_group(backend: str, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        assert device_id is None or device_id.type == "cuda"
        join("gloo", *args, **kwargs)

    dist.init_process_group = init_process_group
    dist.get_backend = lambda group=None: "nccl"


def _patch_modules() -> None:
    """Let `Module.to` replace parameters: torch swaps their data, which no wrapper of a CPU tensor can."""

    def _apply(self: torch.nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
        for child in self.children() if recurse else ():
            child._apply(fn)
        for store in (self._parameters, self._buffers):
            for key, old in store.items():
                if old is None:
                    continue
                with torch.no_grad():
                    new = fn(old)
                if store is self._parameters and type(new) is type(old):
                    old.data = new
                    continue
                if store is self._parameters:
                    kept = {name: value for name, value in old.__dict__.items() if name != "inner"}
                    new = torch.nn.Parameter(new, old.requires_grad)
                    new.__dict__.update(kept)
                store[key] = new
        return self

    torch.nn.Module._apply = _apply  # type: ignore[method-assign,assignment]


def _patch_factories() -> None:
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _from_values(getattr(torch, name), keeps=name == "as_tensor"))
    for name in ("empty", "zeros", "ones", "full", "arange", "rand", "randn", "randint", "randperm", "eye"):
        setattr(torch, name, _named(getattr(torch, name)))
    for name in ("empty_like", "zeros_like", "ones_like", "full_like"):
        setattr(torch, name, _named(getattr(torch, name)))


def _named(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def make(*args: Any, **kwargs: Any) -> Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CUDA
        return factory(*args, **kwargs)

    return make


def _from_values(factory: Callable[..., Tensor], *, keeps: bool) -> Callable[..., Tensor]:
    def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        target = CUDA if _is_cuda(device) else device
        if keeps and isinstance(data, torch.Tensor):
            return data if target is None else data.to(target)
        values = tree_map(lambda leaf: leaf.item() if isinstance(leaf, Pretend) else leaf, data)
        made = factory(values, *args, **kwargs)
        return made if target is None else made.to(target)

    return make


@contextlib.contextmanager
def waits() -> Iterator[collections.Counter[str]]:
    """Count the host's waits inside the block, by line of code."""
    WAITS.clear()
    found: collections.Counter[str] = collections.Counter()
    yield found
    found.update(WAITS)
