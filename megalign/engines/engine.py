"""What a step needs of an engine: a few verbs over packed micro-batches, whatever holds the weights.

Axes: N scored tokens of a micro-batch, M of them that this rank's context group computes (fewer than N only under
context parallelism), L of those whose hidden states this rank holds (fewer than M only under sequence parallelism),
H hidden, V this rank's rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.ops.head_blocks import HeadConfig
from megalign.ops.hidden_rows import TokenShard
from megalign.ops.linear_logp import TokenLogp, linear_logp, weighted_logp
from megalign.ops.vocab import VocabShard


@dataclass(frozen=True, slots=True)
class ContextTokens:
    """Which of a micro-batch's scored tokens this rank computes, and the ranks that compute the others."""

    place_M: Tensor
    num_tokens: int
    group: dist.ProcessGroup

    def spread(self, found: TokenLogp, *, fetch: bool) -> TokenLogp:
        """The same for all tokens: this rank's, differentiable, and the others' by one all-reduce (0 without it)."""
        present = [
            row_M for row_M in (found.logp_N, found.lse_N, found.entropy_N, found.correct_N) if row_M is not None
        ]
        whole = present[0].new_zeros(len(present), self.num_tokens)
        for row_N, row_M in zip(whole, present, strict=True):
            row_N[self.place_M] = row_M.detach().to(row_N.dtype)
        if fetch and self.num_tokens:
            dist.all_reduce(whole, group=self.group)
        rows = iter(whole)
        logp_N, lse_N = next(rows).index_copy(0, self.place_M, found.logp_N), next(rows)
        entropy_N = None if found.entropy_N is None else next(rows).index_copy(0, self.place_M, found.entropy_N)
        correct_N = None if found.correct_N is None else next(rows) > 0
        return TokenLogp(logp_N, lse_N, entropy_N, correct_N)


@dataclass(frozen=True, slots=True)
class Head:
    """The scored hidden states of one micro-batch and the head's rows: all that an objective may use of a model."""

    hidden_LH: Tensor
    weight_VH: Tensor
    target_M: Tensor
    shard: VocabShard
    tokens: TokenShard | None
    context: ContextTokens | None
    cfg: HeadConfig

    def logp(self, *, entropy: bool = False, accuracy: bool = False) -> TokenLogp:
        """Log-probs and what else is asked for, fp32 [N]; differentiable as far as this rank computes them."""
        found = linear_logp(
            self.hidden_LH,
            self.weight_VH,
            self.target_M,
            self.shard,
            tokens=self.tokens,
            cfg=self.cfg,
            entropy=entropy,
            accuracy=accuracy,
        )
        return found if self.context is None else self.context.spread(found, fetch=True)

    def weighted(
        self, coefficient_N: Tensor, lse_N: Tensor | None = None, *, accuracy: bool = False
    ) -> tuple[Tensor, TokenLogp]:
        """(this rank's part of the sum of coefficient x log-prob, log-probs [N]) with the gradient formed at once.

        With `lse_N` log-probs are right where `formed_N` is true.
        """
        mine = slice(None) if self.context is None else self.context.place_M
        value, found = weighted_logp(
            self.hidden_LH,
            self.weight_VH,
            self.target_M,
            coefficient_N[mine],
            self.shard,
            lse_N=None if lse_N is None else lse_N[mine],
            tokens=self.tokens,
            cfg=self.cfg,
            accuracy=accuracy,
        )
        return value, found if self.context is None else self.context.spread(found, fetch=lse_N is None)

    def formed_N(self) -> Tensor:
        """Which tokens' own logits this rank has formed, bool [N]."""
        owned_M, _ = self.shard.localize(self.target_M)
        if self.context is None:
            return owned_M
        return owned_M.new_zeros(self.context.num_tokens).index_copy(0, self.context.place_M, owned_M)


# Called on the last stage, once a micro-batch and in order: (place, head) -> (loss with every factor inside, anything).
Objective = Callable[[int, Head], tuple[Tensor, Any]]


@dataclass(frozen=True, slots=True)
class MicroBatchShape:
    """How an engine wants its micro-batches cut."""

    data_rank: int
    data_size: int
    multiple_of: int = 1  # token positions of a micro-batch
    slot_multiple_of: int = 1  # token positions of a sequence
    min_per_rank: int = 1  # micro-batches
    attention_cost: float = 0.0  # of a pair of positions, relative to all else that a position costs


class Scorer(Protocol):
    """Weights that give scores; every method is called by all ranks alike."""

    cut: MicroBatchShape
    device: torch.device

    def forward(self, batches: Sequence[Any], *, entropy: bool = False, accuracy: bool = False) -> list[TokenLogp]:
        """Log-probs of each micro-batch without gradient; empty where this rank has no head."""

    def sum_over_data(self, value: Tensor) -> Tensor:
        """Sum of what the ranks with a head hold for their own data, on every rank of the job."""


class Engine(Scorer, Protocol):
    """Weights, optimizer and process groups."""

    dtype: torch.dtype
    balances_experts: bool  # whether an auxiliary loss is on, which makes every step a two-pass one

    def aux_loss(self) -> float:
        """The experts' auxiliary loss of the batches that `forward` took last, on every rank; 0 where there is none."""

    def backward(self, batches: Sequence[Any], objective: Objective) -> list[Any]:
        """Accumulate the summed gradient of the objectives over the whole job; what they returned, or empty."""

    def update(self, lr: float, *, clip_norm: float | None) -> float | None:
        """One optimizer step; the gradient's norm before clipping, or a non-finite one with no step taken."""

    def max_over_job(self, value: float) -> float:
        """The largest value any rank holds."""

    def load_weights(self, hf_dir: Path) -> None:
        """Replace the weights by a checkpoint's; the optimizer's copies follow."""

    def full_tensors(self, kind: str = "weight") -> Iterator[tuple[str, Tensor]]:
        """(Megatron name, whole tensor without padding) one at a time, on every rank; kind: weight or grad."""

    def own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Megatron name, whole weight) of what this rank is to write: over all ranks each weight comes once."""

    def adapter_tensors(self, kind: str = "weight") -> Iterator[tuple[str, Tensor]]:
        """(name as in PEFT's files, whole tensor) of each adapter, on every rank; none where all weights train."""

    def save(self, folder: Path, extra: dict[str, Any]) -> None: ...

    def load(self, folder: Path) -> dict[str, Any]: ...
