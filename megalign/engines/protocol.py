"""Defines what training needs of an engine, over packed micro-batches and in Hugging Face's tensor names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megalign.data.micro_batch import MicroBatch
from megalign.data.packing import MicroBatchShape
from megalign.engines.head import Head
from megalign.engines.replicas import Replica
from megalign.engines.saving import Saving
from megalign.ops.linear_logp import TokenLogp

# Called where the head is, once for each micro-batch: (index, head) -> (loss with every factor inside, any payload).
Objective = Callable[[int, Head], tuple[Tensor, Any]]


@dataclass(frozen=True, slots=True)
class Want:
    """Selects what is computed besides log-probs."""

    entropy: bool = False
    accuracy: bool = False
    by_token: bool = False  # scoring keeps log-probs and log-sum-exps by token; engines ignore it


LOGP_ONLY = Want()


class Scorer(Protocol):
    """Computes log-probs under some weights; every method is called on all ranks."""

    shape: MicroBatchShape
    device: torch.device

    def forward(self, batches: Sequence[MicroBatch], want: Want = LOGP_ONLY) -> list[TokenLogp]:
        """Return the log-probs of each micro-batch without gradient; an empty list where this rank has no head."""

    def sum_over_data(self, value: Tensor) -> Tensor:
        """Sum `value` over the data ranks that have a head and return the sum on every rank of the job."""


class Engine(Scorer, Protocol):
    """Holds weights, optimizer and process groups."""

    dtype: torch.dtype
    balances_experts: bool  # whether an auxiliary loss is on, which makes every step a two-pass one
    note: str  # how sequences are run, for the log; "" where there is nothing to say

    def aux_loss(self) -> float:
        """Return the experts' auxiliary loss of the last `forward`'s batches, on every rank; 0 where there is none."""

    def backward(self, batches: Sequence[MicroBatch], objective: Objective) -> list[Any]:
        """Accumulate the gradient of the objectives' sum over the whole job; return their payloads (none without head).

        With an auxiliary loss these must be the batches of the last `forward`, under the same weights.
        """

    def update(self, lr: float) -> float | None:
        """Take one optimizer step, unless the gradient norm is not finite; return the norm before clipping."""

    def max_over_job(self, value: float) -> float:
        """Return the maximum over all ranks."""

    def load_weights(self, hf_dir: Path) -> None:
        """Replace the weights by those of a Hugging Face directory; the optimizer's copies follow."""

    def hf_tensors(self, kind: str = "weight") -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, whole tensor) one at a time, on every rank; kind: weight or grad."""

    def own_hf_tensors(self) -> Iterator[tuple[str, int | None, Tensor]]:
        """Yield (Hugging Face name, expert, weight) of what this rank writes of an export; each comes on one rank.

        Adapters are merged. Tensors that stack all experts come one expert at a time; elsewhere expert is None. Ranks
        may wait for each other: call it on every rank and run it to its end.
        """

    def adapter_tensors(self, kind: str = "weight") -> Iterator[tuple[str, Tensor]]:
        """Yield (PEFT name, whole tensor) of each adapter, on every rank; nothing where all weights train."""

    def replicas(self) -> Iterator[Replica]:
        """Yield the parameters that several ranks hold alike, with their groups; empty on one rank."""

    def base(self) -> Scorer:
        """Return a scorer of the same weights without adapters."""

    def begin_save(self, folder: Path, extra: dict[str, Any], *, copied: bool) -> Saving:
        """Prepare to write weights, optimizer and `extra` (plain values) into an empty folder; call it on every rank.

        copied: copy the values to host memory, so that training may go on before they are written. Else they must not
        change until then.
        """

    def load(self, folder: Path) -> dict[str, Any]:
        """Load what a save wrote, under any layout of the same engine; return its `extra`."""
