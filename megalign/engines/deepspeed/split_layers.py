"""Splits the linear layers of a transformers model over tensor ranks by transformers' own plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megalign.convert.hf.auto_model import decoder_of
from megalign.engines.deepspeed.hf_weights import Split
from megalign.engines.deepspeed.plan import COLUMN, SUMMED, planned


class _Copied(torch.autograd.Function):
    """Passes a tensor to every rank's part of a layer; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Summed(torch.autograd.Function):
    """Sums a tensor over ranks; each rank's gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class RowsLinear(nn.Linear):
    """Computes this rank's rows of a linear layer's output from the whole input."""

    group: dist.ProcessGroup

    def forward(self, input: Tensor) -> Tensor:
        """Return the output's part."""
        return F.linear(_Copied.apply(input, self.group), self.weight, self.bias)


class ColumnsLinear(nn.Linear):
    """Computes a linear layer's whole output from this rank's part of the input."""

    group: dist.ProcessGroup

    def forward(self, input: Tensor) -> Tensor:
        """Return the output, the same on every rank."""
        total: Tensor = _Summed.apply(F.linear(input, self.weight), self.group)
        return total if self.bias is None else total + self.bias


@contextmanager
def without_memory() -> Iterator[None]:
    """Have modules that are built inside the block keep their parameters, but not buffers, on the meta device."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def split_layers(model: Any, group: dist.ProcessGroup, device: torch.device) -> dict[nn.Parameter, Split]:
    """Keep this rank's part of a model that was built without memory, with arbitrary values; return what is split."""
    modules = dict(decoder_of(model).named_modules())
    splits: dict[nn.Parameter, Split] = {}
    for name, style in planned(model).items():
        if style != SUMMED:
            splits |= _split_layer(modules[name], group, rows=style == COLUMN)
    values: dict[nn.Parameter, nn.Parameter] = {}  # shared ones once
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in values:
                values[parameter] = nn.Parameter(torch.empty_like(parameter, device=device))
            setattr(module, name, values[parameter])
    for parameter in splits:
        values[parameter].tensor_model_parallel = True  # type: ignore[attr-defined]  # DeepSpeed's norm asks for it
    return {values[parameter]: split for parameter, split in splits.items()}


def _split_layer(layer: Any, group: dist.ProcessGroup, *, rows: bool) -> dict[nn.Parameter, Split]:
    """Make a linear layer compute its part; return the parameters of which it keeps a part."""
    layer.__class__, layer.group = RowsLinear if rows else ColumnsLinear, group
    splits = {}
    for name in ("weight", "bias") if rows and layer.bias is not None else ("weight",):
        whole, dim = layer.get_parameter(name), 0 if rows else 1
        split = Split(dim, (whole.shape[dim] // group.size(),) * group.size())
        part = nn.Parameter(split.part(whole.detach(), group.rank()))
        setattr(layer, name, part)
        splits[part] = split
    layer.out_features, layer.in_features = layer.weight.shape
    return splits


def sum_gradients(model: Any, group: dist.ProcessGroup) -> None:
    """Sum the gradients of what every rank has and applies to its own heads; call once it is known what trains."""
    summed = [name for name, style in planned(model).items() if style == SUMMED]
    for key, parameter in decoder_of(model).named_parameters():
        if parameter.requires_grad and any(key == name or key.startswith(f"{name}.") for name in summed):
            sum_gradient(parameter, group)


def sum_gradient(parameter: Tensor, group: dist.ProcessGroup) -> None:
    """Have each gradient of a parameter summed over a group, in fp32, before it is accumulated."""

    def total(gradient: Tensor) -> Tensor:
        whole = gradient.float().clone()
        dist.all_reduce(whole, group=group)
        return whole.to(gradient.dtype)

    parameter.register_hook(total)
