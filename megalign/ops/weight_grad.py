"""Where a head's weight gradient is added up, in fp32: Megatron's `main_grad`, or a buffer that autograd is given."""

from __future__ import annotations

import torch
from torch import Tensor

from megalign.ops.head_blocks import wide


class WeightGrad:
    """The sum of a call's dW [V, H] and, where there is a bias, of its gradient [V].

    Megatron's DDP adds `weight.grad` to `main_grad` in a hook on the weight and drops it where
    `grad_added_to_main_grad` is set, so a sum that is already in `main_grad` must set it and still make the hook fire.
    """

    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None, *, weight: bool, bias: bool, direct: bool) -> None:
        main = getattr(weight_VH, "main_grad", None) if direct and weight else None
        self.direct = main is not None and main.dtype == wide(weight_VH.dtype)
        self._weight, self._bias = weight_VH, bias_V
        self.sum_VH: Tensor | None = None
        self.bias_V: Tensor | None = None
        if weight:
            self.sum_VH = main if self.direct else torch.zeros_like(weight_VH, dtype=wide(weight_VH.dtype))
        if bias and bias_V is not None:
            self.bias_V = torch.zeros_like(bias_V, dtype=wide(bias_V.dtype))

    def for_autograd(self, scale: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """(gradient of the weight, of the bias), times `scale`, as a backward returns them; once."""
        bias_V = None
        if self.bias_V is not None and self._bias is not None:
            bias_V = (self.bias_V if scale is None else self.bias_V * scale).to(self._bias.dtype)
        if self.sum_VH is None:
            return None, bias_V
        if self.direct:
            self._announce()
            return None, bias_V
        sum_VH, self.sum_VH = self.sum_VH, None  # autograd copies what others hold
        return (sum_VH if scale is None else sum_VH.mul_(scale)).to(self._weight.dtype), bias_V

    def _announce(self) -> None:
        """Tell Megatron's hook, which wants to see a gradient: one number in the shape of the weight takes no memory.

        A weight that is the embedding's too gets its visible gradient from there, and the hook adds that one.
        """
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        if not getattr(self._weight, "zero_out_wgrad", False) and self._weight.grad is None:
            self._weight.grad = self._weight.new_zeros(1).expand_as(self._weight)
