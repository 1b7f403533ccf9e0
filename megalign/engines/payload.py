"""Holds what a micro-batch's objective gives back, and reads it from the device once a step.

Axes: N scored tokens of a micro-batch, S its sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megalign.data.micro_batch import MicroBatch
from megalign.engines.loss_inputs import StepBatch
from megalign.engines.token_metrics import measured_sums, mismatch
from megalign.ops.linear_logp import TokenLogp
from megalign.ops.segments import segment_sum
from megalign.ops.transfer import to_host


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Holds the loss's gradient with respect to a micro-batch's log-probs."""

    token_N: Tensor  # dL / d log-prob of each scored token, in the log-probs' dtype and on their device
    member_S: Tensor  # dL/ds of each member, as StepResult.coefficient_S has it
    sums: Mapping[str, float]  # token-level losses: this micro-batch's share of the loss and of each metric, by name


@dataclass(frozen=True, slots=True)
class Payload:
    """Holds a micro-batch's numbers after its backward; only ranks with a head have them."""

    logp_N: Tensor
    coefficients: Coefficients
    measured: Mapping[str, Tensor]  # sums over its tokens of entropy and accuracy, as far as they were computed
    gap: Tensor | None  # largest difference between the passes in a token's log-prob
    share: Tensor | None = None  # of a token-level loss, where it is not in `coefficients.sums`


@dataclass(frozen=True, slots=True)
class Read:
    """Holds a micro-batch's numbers on the CPU, read after the last backward of the step."""

    policy_S: Tensor  # sums of its members
    coefficient_S: Tensor
    sums: Mapping[str, Mapping[str, float]]  # by kind and name: shares, measured, mismatch
    gap: float
    mismatch_max: float


def payload(
    output: TokenLogp, coefficients: Coefficients, gap: Tensor | None = None, *, share: Tensor | None = None
) -> Payload:
    """Keep what a micro-batch has computed where it is: to read a number now would make the host wait for it."""
    return Payload(output.logp_N.detach(), coefficients, measured_sums(output), gap, share)


def read(batch: StepBatch, batches: Sequence[MicroBatch], payloads: Sequence[Payload]) -> list[Read]:
    """Bring the payloads of all micro-batches to the CPU, in two waits of the host."""
    numbers = [(payload.gap, payload.share, *payload.measured.values()) for payload in payloads]
    flat = iter(to_host([value.double() for each in numbers for value in each if value is not None]))
    logp = to_host([payload.logp_N for payload in payloads])
    return [
        _read_one(batch, micro, payload, logp_N, flat)
        for micro, payload, logp_N in zip(batches, payloads, logp, strict=False)
    ]


def _read_one(batch: StepBatch, micro: MicroBatch, payload: Payload, logp_N: Tensor, flat: Iterator[Tensor]) -> Read:
    gap = 0.0 if payload.gap is None else float(next(flat))
    shares = dict(payload.coefficients.sums)
    if payload.share is not None:
        shares["loss"] = float(next(flat))
    measured = {name: float(next(flat)) for name in payload.measured}
    total = largest = 0.0
    if batch.on_policy:
        total, largest = mismatch([batch.sequences[member] for member in micro.members], logp_N)
    sums = {"shares": shares, "measured": measured, "mismatch": {"mismatch": total}}
    policy_S = segment_sum(logp_N, micro.seq_N, len(micro.members))
    return Read(policy_S, payload.coefficients.member_S.double(), sums, gap, largest)
