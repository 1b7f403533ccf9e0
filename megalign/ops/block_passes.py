"""Turns a block's matrix product into softmax statistics, or into the logits' gradient, in one compiled pass each.

Axes: C tokens of a chunk, R rows of a tile. On a GPU the plain operations of `head_blocks` and `logits_grad` read and
write a block some ten times; torch.compile fuses these functions into kernels that read it once or twice. They change
none of their arguments, so that what a compiler could not do is done again without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megalign.ops.statistics import Statistics, Wanted
from megalign.schema import UserError, reason_of

# (factor before the cap, factor after it or None where nothing is capped). As tensors: torch.compile takes numbers for
# inputs on the CPU, or compiles again for each.
Factors = tuple[Tensor, Tensor | None]


def _logits(product: Tensor, bias: Tensor | None, factors: Factors) -> tuple[Tensor, Tensor | None]:
    """Return (logits, slope of the cap or None)."""
    inner, outer = factors
    scaled = (product if bias is None else product + bias) * inner
    if outer is None:
        return scaled, None
    tanh = torch.tanh(scaled)
    return tanh * outer, 1.0 - tanh * tanh


def _target_logits(
    product_CR: Tensor, bias_R: Tensor | None, factors: Factors, owned_C: Tensor, row_C: Tensor
) -> Tensor:
    """Return the targets' logits, from the same operations in both passes: equal to the bit."""
    product_C = product_CR.gather(1, row_C[:, None]).squeeze(1)
    return _logits(product_C, None if bias_R is None else bias_R[row_C], factors)[0].where(owned_C, 0.0)


def statistics_pass(
    product_CR: Tensor, bias_R: Tensor | None, factors: Factors, owned_C: Tensor, row_C: Tensor, *, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return the fields of a block's `Statistics`. row_C: the target's row, 0 if not owned_C."""
    logits_CR, _ = _logits(product_CR, bias_R, factors)
    largest_C = logits_CR.amax(dim=1)
    below_CR = logits_CR - largest_C[:, None]
    exponential_CR = below_CR.exp()
    total_C = exponential_CR.sum(dim=1)
    log_total_C = total_C.log()
    entropy_C = log_total_C - (below_CR * exponential_CR).sum(dim=1) / total_C if entropy else None
    logit_C = _target_logits(product_CR, bias_R, factors, owned_C, row_C)
    return log_total_C + largest_C, logit_C, entropy_C, largest_C


def gradient_pass(
    product_CR: Tensor,
    bias_R: Tensor | None,
    factors: Factors,
    owned_C: Tensor,
    row_C: Tensor,
    lse_C: Tensor,
    coefficient_C: Tensor,
    entropy: tuple[Tensor, Tensor] | None,  # (coefficient of the entropy, the entropy), [C]
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (gradient of the product [C, R] in `dtype`, the targets' logits [C], the gradient of a bias [R]).

    Coefficients are times d logits / d product, the slope of the cap apart.
    """
    logits_CR, slope_CR = _logits(product_CR, bias_R, factors)
    below_CR = logits_CR - lse_C[:, None]
    if entropy is None:
        grad_CR = below_CR.exp() * -coefficient_C[:, None]
    else:  # d entropy / d logit = -p (log p + entropy)
        entropy_coefficient_C, entropy_C = entropy
        constant_C = entropy_coefficient_C * entropy_C + coefficient_C
        grad_CR = below_CR.exp() * -(below_CR * entropy_coefficient_C[:, None] + constant_C[:, None])
    place_C = row_C.where(owned_C, -1)
    is_target_CR = torch.arange(product_CR.shape[1], device=product_CR.device) == place_C[:, None]
    grad_CR = torch.where(is_target_CR, grad_CR + coefficient_C[:, None], grad_CR)
    if slope_CR is not None:
        grad_CR = grad_CR * slope_CR
    logit_C = _target_logits(product_CR, bias_R, factors, owned_C, row_C)
    return grad_CR.to(dtype), logit_C, None if bias_R is None else grad_CR.sum(dim=0)


class CompiledPasses:
    """Holds both passes compiled for all sizes of blocks; after a failure of the compiler `failed` is True.

    Then the call that met it runs the same functions without the compiler, and later ones the plain operations.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        self.failed = False
        self._backend = backend
        self._compiled: dict[str, Callable[..., Any]] = {}

    def statistics(self, *arguments: Any, wanted: Wanted) -> Statistics:
        """Return what `statistics_pass` does, without what is not wanted."""
        found = self._run(statistics_pass, arguments, {"entropy": wanted.entropy})
        return Statistics(*found) if wanted.largest else Statistics(*found[:3])

    def gradient(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what `gradient_pass` does."""
        found: tuple[Tensor, Tensor, Tensor | None] = self._run(gradient_pass, arguments, options)
        return found

    def _run(self, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        # torch.compile takes a size of one for a constant: it would compile again for a last chunk of one token.
        if not self.failed and min(arguments[0].shape) > 1:
            try:
                return self._of(function)(*arguments, **options)
            except torch.OutOfMemoryError:  # the plain operations need as much
                raise
            except Exception as error:  # of the compiler, of Triton or of the C compiler: no common class
                self.failed = True
                why = reason_of(error).partition(" Set TORCH")[0]  # without torch's advice
                told = f"the compiler failed ({type(error).__name__}: {why})"
                print(f"megalign: engine.head_kernel: torch from here on, {told}", file=sys.stderr, flush=True)
        return function(*arguments, **options)

    def _of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a pass compiled with sizes that are not constants: chunks and last tiles differ in size."""
        if function.__name__ not in self._compiled:  # made at first use: importing torch's compiler takes a second
            options = _compiler_options() if self._backend == "inductor" else None
            self._compiled[function.__name__] = torch.compile(
                function, dynamic=True, fullgraph=True, backend=self._backend, options=options
            )
        return self._compiled[function.__name__]


def _compiler_options() -> dict[str, Any]:
    """Return how to compile: in this process, as two kernels need no pool of 32, and alike on every rank.

    Where torch can, no kernel is chosen by timing it, and sums over a row are not split when the first chunk is small.
    """
    import torch._inductor.config as known

    options: dict[str, Any] = {"compile_threads": 1, "deterministic": True, "split_reductions": False}
    return {name: value for name, value in options.items() if hasattr(known, name)}


@lru_cache
def compiler_problem(device: str) -> str | None:
    """Return why torch.compile cannot make kernels for a device; None where it seems to be able to."""
    try:
        from torch import _dynamo, _inductor  # noqa: F401

        if device == "cuda":
            import triton  # noqa: F401
    except Exception as error:  # an installation that is broken raises anything
        return f"{type(error).__name__}: {reason_of(error)}"
    return None


def wants_compiled(kernel: str, device: torch.device) -> bool:
    """Tell whether `engine.head_kernel` asks for compiled passes on a device."""
    # Which kernel a compiler makes, and so how it rounds, may depend on the sizes that it meets first: not the same
    # after a resume.
    suited = device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()
    return kernel == "compiled" or (kernel == "auto" and suited)


def choose_passes(kernel: str, device: torch.device) -> CompiledPasses | None:
    """Return compiled passes where they are wanted and possible, else None; UserError where they are insisted on."""
    if not wants_compiled(kernel, device):
        return None
    problem = compiler_problem(device.type)
    if problem is None:
        return CompiledPasses()
    if kernel == "auto":
        return None
    raise UserError(
        f"engine.head_kernel is 'compiled': torch.compile cannot work here ({problem}); must be auto or torch"
    )
