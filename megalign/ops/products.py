"""Multiplies low-precision matrices into fp32 on a GPU, with the operators that its torch has.

torch 2.8 is the first whose `mm` takes `out_dtype`; its `addmm` with an fp32 sum came with 2.10. What a device accepts
is asked once, by a product of a few numbers, never of a CPU, where neither exists.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from megalign.schema import UserError

SIDE = 16  # of the probe's matrices: a multiple of what tensor cores take
# A sum that low precision cannot hold; with the product, 16, it is exact in fp32.
SUM = 1 + 2.0**-10


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Overwrite fp32 `out` by left @ right, never rounded to their dtype."""
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor, scratch: Callable[[], Tensor]) -> None:
    """Add left @ right to the fp32 `total` where it stands; scratch: gives memory of its shape, for older torch."""
    if adds_in_place(total.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.add_(product(left, right, scratch()))


@lru_cache
def adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether a device adds a low-precision product to an fp32 sum in place, without rounding either."""
    total, ones = torch.full((SIDE, SIDE), SUM, device=device), torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # refused: of another dtype than the product's operands, or the argument unknown
        return False
    return bool((total == SIDE + SUM).all())


@lru_cache
def check_products(device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError where a device cannot multiply low-precision matrices into fp32."""
    ones = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    try:
        product(ones, ones, torch.empty(SIDE, SIDE, device=device))
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"torch {torch.__version__} does not multiply {str(dtype).removeprefix('torch.')} into float32 on "
            f"{device.type} ({str(error).splitlines()[0]}); must be torch 2.8 or newer, or run.dtype fp32"
        ) from None
