"""Scores sequences: computes their log-probs under an engine's weights, without gradient.

Axes: S sequences, N scored tokens of a micro-batch, T scored tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from megalign.data.group import TokenSequence
from megalign.data.micro_batch import MicroBatch
from megalign.data.packing import Packing, micro_batches
from megalign.engines.protocol import LOGP_ONLY, Scorer, Want
from megalign.ops.linear_logp import TokenLogp
from megalign.ops.segments import segment_sum
from megalign.ops.transfer import to_host

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Scored:
    """Holds a sequence's log-probs under some weights: sums are float64, tensors by token fp32 on the CPU."""

    total: float
    logp_N: Tensor | None = None  # None unless kept by token; so is lse_N
    lse_N: Tensor | None = None
    entropy: float | None = None  # sum over scored tokens; None if not requested
    num_correct: float | None = None  # tokens that no other is likelier than; None if not requested


class BaseModel:
    """Scores with an engine's weights, its adapters off."""

    def __init__(self, engine: Scorer, adapters_off: Callable[[], AbstractContextManager[None]]) -> None:
        self.engine, self.adapters_off = engine, adapters_off
        self.shape, self.device, self.sum_over_data = engine.shape, engine.device, engine.sum_over_data

    def forward(self, batches: Sequence[MicroBatch], want: Want = LOGP_ONLY) -> list[TokenLogp]:
        """Return the log-probs of each micro-batch under the base model, without adapters."""
        with self.adapters_off():
            return self.engine.forward(batches, want)


def sum_by_name(engine: Scorer, parts: Mapping[Name, Tensor]) -> dict[Name, Tensor]:
    """Sum named tensors of one dtype over the data ranks in one collective.

    Every rank passes the same names and shapes; values of ranks without a head are ignored.
    """
    flat = torch.cat([part.reshape(-1) for part in parts.values()])
    pieces = engine.sum_over_data(flat).split([part.numel() for part in parts.values()])
    return {name: piece.view_as(part) for (name, part), piece in zip(parts.items(), pieces, strict=True)}


def score(
    engine: Scorer,
    sequences: Sequence[TokenSequence],
    *,
    coupled: bool,
    packing: Packing,
    want: Want = LOGP_ONLY,
) -> list[Scored]:
    """Return every sequence's log-probs and what else `want` selects, in the sequences' order, on every rank."""
    batches = micro_batches(engine.shape, sequences, coupled=coupled, packing=packing).batches
    return score_batches(engine, sequences, batches, want)


def score_batches(
    engine: Scorer, sequences: Sequence[TokenSequence], batches: Sequence[MicroBatch], want: Want
) -> list[Scored]:
    """Return `score`'s result for sequences that are already packed; batches: this rank's micro-batches."""
    outputs = engine.forward(batches, want)
    sizes = [sequence.num_scored for sequence in sequences]
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    wanted = ["logp", *["entropy"] * want.entropy, *["correct"] * want.accuracy]
    sums = {name: torch.zeros(len(sequences), dtype=torch.float64) for name in wanted}
    tokens = {name: torch.zeros(starts[-1]) for name in ("logp", "lse")} if want.by_token else {}
    for batch, on_cpu in zip(batches, _read(outputs), strict=False):
        members = list(batch.members)
        for name, sum_S in sums.items():
            sum_S[members] = segment_sum(on_cpu[name], batch.seq_N, len(members))
        for name, token_T in tokens.items():
            for index, value_N in zip(members, on_cpu[name].split([sizes[index] for index in members]), strict=True):
                token_T[starts[index] : starts[index + 1]] = value_N
    sums = sum_by_name(engine, sums)
    if want.by_token:
        tokens = sum_by_name(engine, tokens)
    columns = {name: sum_S.tolist() for name, sum_S in sums.items()}
    return [
        Scored(
            columns["logp"][index],
            tokens["logp"][start:end] if want.by_token else None,
            tokens["lse"][start:end] if want.by_token else None,
            columns["entropy"][index] if want.entropy else None,
            columns["correct"][index] if want.accuracy else None,
        )
        for index, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True))
    ]


def _read(outputs: Sequence[TokenLogp]) -> list[dict[str, Tensor]]:
    """Return the values of each micro-batch by name on the CPU; one wait of the host for each name."""
    found: list[dict[str, Tensor]] = [{} for _ in outputs]
    for name, field in {"logp": "logp_N", "lse": "lse_N", "entropy": "entropy_N", "correct": "correct_N"}.items():
        values = [getattr(output, field) for output in outputs]
        if values and values[0] is not None:
            for each, value_N in zip(found, to_host(values), strict=True):
                each[name] = value_N
    return found
