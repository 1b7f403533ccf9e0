"""What a step needs of an engine: a few verbs over packed micro-batches, whatever holds the weights.

Axes: N scored tokens of a micro-batch, H hidden, V this rank's rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megalign.ops.linear_logp import linear_logp, weighted_logp
from megalign.ops.vocab import VocabShard


@dataclass(frozen=True, slots=True)
class Head:
    """The scored hidden states of one micro-batch and the head's rows: all that an objective may use of a model."""

    hidden_NH: Tensor
    weight_VH: Tensor
    target_N: Tensor
    shard: VocabShard
    temperature: float
    chunk_tokens: int | None
    reduce_hidden_grad: bool

    def logp(self) -> tuple[Tensor, Tensor]:
        """(log-probs, lse), fp32 [N]; differentiable (`megalign.ops.linear_logp`)."""
        return linear_logp(
            self.hidden_NH,
            self.weight_VH,
            self.target_N,
            self.shard,
            temperature=self.temperature,
            chunk_tokens=self.chunk_tokens,
            reduce_hidden_grad=self.reduce_hidden_grad,
        )

    def weighted(self, coefficient_N: Tensor, lse_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(sum of coefficient x log-prob, log-probs [N]) with the gradient formed at once (`ops.weighted_logp`)."""
        return weighted_logp(
            self.hidden_NH,
            self.weight_VH,
            self.target_N,
            coefficient_N,
            self.shard,
            lse_T=lse_N,
            temperature=self.temperature,
            chunk_tokens=self.chunk_tokens,
            reduce_hidden_grad=self.reduce_hidden_grad,
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

    def forward(self, batches: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        """(log-probs, lse) of each micro-batch without gradient; empty where this rank has no head."""

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
