"""Sums a head's weight gradient in fp32, in a buffer of the engine or in one that is returned to autograd."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megalign.ops.head_blocks import accumulation_dtype


class GradSink(Protocol):
    """Takes dW [V, H] in place of autograd, whether or not the weight that was given requires a gradient."""

    sum_VH: Tensor  # fp32 (float64 for float64 weights); dW is added to it block by block

    def added(self) -> None:
        """Note that all of a call's dW is in `sum_VH`; called once in each backward."""


class MainGrad:
    """Adds dW to Megatron's fp32 `main_grad` of a parameter.

    Megatron's DDP adds `weight.grad` to `main_grad` in a hook on the weight and drops it where
    `grad_added_to_main_grad` is set, so a sum that is already in `main_grad` must set it and still make the hook fire.
    """

    def __init__(self, parameter_VH: Tensor) -> None:
        self.parameter_VH = parameter_VH
        self.sum_VH: Tensor = parameter_VH.main_grad  # type: ignore[attr-defined]

    def added(self) -> None:
        """Set a placeholder gradient so that Megatron's hook fires: one number, expanded to the weight's shape.

        A weight tied to the embedding gets a real gradient from the embedding, which the hook adds to `main_grad`.
        """
        weight_VH = self.parameter_VH
        weight_VH.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        if not getattr(weight_VH, "zero_out_wgrad", False) and weight_VH.grad is None:
            weight_VH.grad = weight_VH.new_zeros(1).expand_as(weight_VH)


def main_grad_sink(parameter_VH: Tensor) -> MainGrad | None:
    """Return the sink of a parameter that trains and has a `main_grad` of the accumulation dtype; None for others."""
    main_VH = getattr(parameter_VH, "main_grad", None)
    if not parameter_VH.requires_grad or main_VH is None:
        return None
    return MainGrad(parameter_VH) if main_VH.dtype == accumulation_dtype(parameter_VH.dtype) else None


class WeightGrad:
    """Sums a call's dW [V, H] and, where there is a bias, its gradient [V]."""

    def __init__(
        self, weight_VH: Tensor, bias_V: Tensor | None, *, weight: bool, bias: bool, sink: GradSink | None
    ) -> None:
        self.sink = sink if weight else None
        self.dtype, self.bias_dtype = weight_VH.dtype, None if bias_V is None else bias_V.dtype
        self.sum_VH: Tensor | None = None
        self.bias_V: Tensor | None = None
        if weight:
            dtype = accumulation_dtype(weight_VH.dtype)
            self.sum_VH = torch.zeros_like(weight_VH, dtype=dtype) if sink is None else sink.sum_VH
        if bias and bias_V is not None:
            self.bias_V = torch.zeros_like(bias_V, dtype=accumulation_dtype(bias_V.dtype))

    def for_autograd(self, scale: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of weight and bias, times `scale`, as backward returns them; may be called once."""
        bias_V = None
        if self.bias_V is not None:
            bias_V = (self.bias_V if scale is None else self.bias_V * scale).to(self.bias_dtype)
        if self.sum_VH is None:
            return None, bias_V
        if self.sink is not None:
            self.sink.added()
            return None, bias_V
        sum_VH, self.sum_VH = self.sum_VH, None  # autograd copies a tensor that is referenced elsewhere
        return (sum_VH if scale is None else sum_VH.mul_(scale)).to(self.dtype), bias_V
