"""What a step needs of an engine: a few verbs over packed micro-batches, whatever holds the weights.

Axes: N scored tokens of a micro-batch, L of them whose hidden states this rank holds (fewer than N only under sequence
parallelism), H hidden, V this rank's rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megalign.ops.head_blocks import HeadConfig
from megalign.ops.hidden_rows import TokenShard
from megalign.ops.linear_logp import TokenLogp, linear_logp, weighted_logp
from megalign.ops.vocab import VocabShard


@dataclass(frozen=True, slots=True)
class Head:
    """The scored hidden states of one micro-batch and the head's rows: all that an objective may use of a model."""

    hidden_LH: Tensor
    weight_VH: Tensor
    target_N: Tensor
    shard: VocabShard
    tokens: TokenShard | None
    cfg: HeadConfig

    def logp(self, *, entropy: bool = False, accuracy: bool = False) -> TokenLogp:
        """Log-probs and what else is asked for, fp32 [N]; differentiable (`ops.linear_logp`)."""
        return linear_logp(
            self.hidden_LH,
            self.weight_VH,
            self.target_N,
            self.shard,
            tokens=self.tokens,
            cfg=self.cfg,
            entropy=entropy,
            accuracy=accuracy,
        )

    def weighted(
        self, coefficient_N: Tensor, lse_N: Tensor | None = None, *, accuracy: bool = False
    ) -> tuple[Tensor, TokenLogp]:
        """(sum of coefficient x log-prob, log-probs [N]) with the gradient formed at once (`ops.weighted_logp`)."""
        return weighted_logp(
            self.hidden_LH,
            self.weight_VH,
            self.target_N,
            coefficient_N,
            self.shard,
            lse_N=lse_N,
            tokens=self.tokens,
            cfg=self.cfg,
            accuracy=accuracy,
        )


# Called on the last stage, once a micro-batch and in order: (place, head) -> (loss with every factor inside, anything).
Objective = Callable[[int, Head], tuple[Tensor, Any]]


@dataclass(frozen=True, slots=True)
class MicroBatchShape:
    """How an engine wants its micro-batches cut."""

    data_rank: int
    data_size: int
    multiple_of: int  # token positions of a micro-batch


class Engine(Protocol):
    """Weights, optimizer and process groups; every method is called by all ranks alike."""

    cut: MicroBatchShape
    device: torch.device

    def forward(self, batches: Sequence[Any], *, entropy: bool = False, accuracy: bool = False) -> list[TokenLogp]:
        """Log-probs of each micro-batch without gradient; empty where this rank has no head."""

    def backward(self, batches: Sequence[Any], objective: Objective) -> list[Any]:
        """Accumulate the summed gradient of the objectives over the whole job; what they returned, or empty."""

    def update(self, lr: float, *, clip_norm: float | None) -> float | None:
        """One optimizer step; the gradient's norm before clipping, or a non-finite one with no step taken."""

    def sum_over_data(self, value: Tensor) -> Tensor:
        """Sum of what the ranks with a head hold for their own data, on every rank of the job."""

    def max_over_job(self, value: float) -> float:
        """The largest value any rank holds."""

    def load_weights(self, hf_dir: Path) -> None:
        """Replace the weights by a checkpoint's; the optimizer's copies follow."""

    def full_tensors(self, kind: str = "weight") -> Iterator[tuple[str, Tensor]]:
        """(Megatron name, whole tensor without padding) one at a time, on every rank; kind: weight or grad."""

    def save(self, folder: Path, extra: dict[str, Any]) -> None: ...

    def load(self, folder: Path) -> dict[str, Any]: ...
