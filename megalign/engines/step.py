"""Takes one exact step over any engine: packs micro-batches and back-propagates sum(coefficient x log-prob).

Axes: S sequences of the global batch, N scored tokens of a micro-batch. The gradient of any loss of sequence or token
log-probs is sum(coefficient x grad log-prob), so a step needs the coefficients before, or while, it runs backward:

- two_pass: pass 1 scores everything, the loss gives the coefficients of the whole global batch, pass 2 runs backward.
- known_scores: the weights have not changed since a scoring pass, whose log-probs replace pass 1.
- single_pass: each micro-batch's coefficients depend on nothing outside it (nothing is coupled, or whole groups fit).

The first step on freshly sampled responses is on policy: the old policy is the current one, so the step's own
log-probs, detached, are the old ones, and the ratio is exactly 1 in every dtype and mode. Losses whose advantages hold
old log-probs are coupled there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megalign.data.micro_batch import MicroBatch
from megalign.data.packing import MicroBatches, Packing, micro_batches
from megalign.engines.head import Head
from megalign.engines.loss_inputs import StepBatch, batch_scores, cat_tokens, step_tokens
from megalign.engines.payload import Coefficients, Payload, Read, payload, read
from megalign.engines.protocol import Engine, Objective, Want
from megalign.engines.scoring import score_batches, sum_by_name
from megalign.engines.token_metrics import (
    mismatch_metrics,
    scored_sums,
    token_means,
)
from megalign.losses.base import (
    LossConfig,
    LossError,
    LossFn,
    LossOut,
    Scores,
    Traits,
    gradient_of,
    loss_function,
    prepared,
    token_metrics_problem,
)
from megalign.ops.linear_logp import TokenLogp
from megalign.ops.segments import segment_sum
from megalign.ops.transfer import to_device, to_host

PassMode = Literal["two_pass", "single_pass", "known_scores"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Holds a step's results, the same on every rank; the gradient itself is in the engine."""

    loss: float
    metrics: Mapping[str, float]
    policy_S: Tensor  # float64 sums before the update
    coefficient_S: Tensor  # float64 dL/ds; for token-level losses the mean over the response's tokens
    pass_mode: PassMode
    pass_gap: float | None
    padding_fraction: float


@dataclass(frozen=True, slots=True)
class _Step:
    """Holds what all micro-batches of a step share."""

    engine: Engine
    batch: StepBatch
    cfg: LossConfig
    traits: Traits
    function: LossFn
    micro: MicroBatches
    scores: Scores  # of the global batch, with group sizes and advantages

    def loss(self, scores: Scores, members: Sequence[int] | None = None) -> LossOut:
        """Call the loss on `members`, None for all; LossError where it fails or has other metrics than declared."""
        try:
            out = self.function(scores, self.cfg)
            if (problem := token_metrics_problem(out, self.traits)) is not None:
                raise LossError(f"loss {self.cfg.name!r} {problem}")
        except LossError as error:
            error.members = members
            raise
        return out

    def scores_at(self, policy_S: Tensor, members: Sequence[int] | None = None) -> Scores:
        """Return the scores with policy_S set: of `members`, or of the whole batch."""
        scores = self.scores if members is None else self.scores.part(members)
        return scores.with_sums(policy_S, on_policy=self.batch.on_policy)


def accumulate(
    engine: Engine, batch: StepBatch, loss: LossConfig, *, packing: Packing, mode: PassMode | None = None
) -> StepResult:
    """Add the exact gradient of the global batch's loss to the engine's, by the cheapest mode or the one given.

    Raises ValueError for a mode that is not exact here.
    """
    traits = loss.traits()
    coupled = is_coupled(traits, on_policy=batch.on_policy)
    micro = micro_batches(engine.shape, batch.sequences, coupled=coupled, packing=packing)
    mode = mode or _cheapest(engine, batch, coupled=coupled and not micro.whole_groups)
    if engine.balances_experts and mode != "two_pass":
        raise ValueError(f"{mode} has no expert counts of the global batch; an auxiliary loss needs two_pass")
    known_old = not (batch.on_policy and traits.old_in_advantages)
    scores = prepared(batch_scores(batch), loss, with_advantages=known_old)
    step = _Step(engine, batch, loss, traits, loss_function(loss), micro, scores)
    payloads = engine.backward(micro.batches, _objective(step, mode))
    return _result(step, payloads, mode)


def evaluate(engine: Engine, batch: StepBatch, loss: LossConfig, *, packing: Packing) -> StepResult:
    """Compute loss and metrics of a global batch under the engine's weights; nothing is accumulated."""
    traits = loss.traits()
    token_level = traits.level == "token"
    want = Want(traits.entropy, traits.accuracy, by_token=token_level)
    micro = micro_batches(engine.shape, batch.sequences, coupled=traits.coupled, packing=packing)
    current = score_batches(engine, batch.sequences, micro.batches, want)
    scores = prepared(batch_scores(batch), loss)
    step = _Step(engine, batch, loss, traits, loss_function(loss), micro, scores)
    policy_S = torch.tensor([scored.total for scored in current], dtype=torch.float64)
    scores = step.scores.with_sums(policy_S)
    if token_level:
        scores = step_tokens(scores, batch, range(len(current)), cat_tokens(each.logp_N for each in current))
    out = step.loss(scores)
    metrics = {name: float(value) for name, value in out.metrics.items()}
    metrics |= token_means(scored_sums(current, traits), scores.num_tokens) | _auxiliary(engine)
    value = float(out.loss) + metrics.get("aux_loss", 0.0)
    zeros_S = torch.zeros_like(policy_S)
    return StepResult(value, metrics, policy_S, zeros_S, "two_pass", None, micro.padding_fraction)


def is_coupled(traits: Traits, *, on_policy: bool) -> bool:
    """Tell whether a sequence's coefficient depends on other sequences' log-probs under the current weights."""
    return traits.coupled or (on_policy and traits.old_in_advantages)


def _cheapest(engine: Engine, batch: StepBatch, *, coupled: bool) -> PassMode:
    if engine.balances_experts:
        return "two_pass"
    if batch.current is not None:
        return "known_scores"
    return "two_pass" if coupled else "single_pass"


def _objective(step: _Step, mode: PassMode) -> Objective:
    """Return the objective that backward calls for each micro-batch, chosen once by mode."""
    if mode == "two_pass":
        forward = step.engine.forward(step.micro.batches, Want(step.traits.entropy, step.traits.accuracy))
        return _with_known_scores(step, forward)
    if mode == "known_scores":
        return _with_known_scores(step, _current_scores(step))
    return _in_one_pass_linear(step) if step.traits.linear else _in_one_pass(step)


def _with_known_scores(step: _Step, known: Sequence[TokenLogp]) -> Objective:
    """Back-propagate with coefficients computed from log-probs [N] that are known before backward."""
    on_host = to_host([before.logp_N for before in known])
    batch_S = None if step.traits.level == "token" else _batch_coefficients(step, on_host)

    def objective(index: int, head: Head) -> tuple[Tensor, Payload]:
        micro, before = step.micro.batches[index], known[index]
        if batch_S is None:
            coefficients = _moved(_token_coefficients(step, micro, on_host[index]), step.engine.device)
        else:
            coefficients = _spread(batch_S[list(micro.members)], micro, before.logp_N)
        value, again = head.weighted(coefficients.token_N, before.lse_N)
        gap = None
        if len(before.logp_N):
            gap = (again.logp_N.detach() - before.logp_N).abs().where(head.formed_N(), 0.0).max()
        return value, payload(before, coefficients, gap)

    return objective


def _in_one_pass(step: _Step) -> Objective:
    """Compute each micro-batch's log-probs and back-propagate at once."""

    def objective(index: int, head: Head) -> tuple[Tensor, Payload]:
        micro = step.micro.batches[index]
        output = head.logp(entropy=step.traits.entropy, accuracy=step.traits.accuracy)
        coefficients = _local_coefficients(step, micro, output.logp_N.detach())
        value = (coefficients.token_N * output.logp_N).sum()
        return value, payload(output, coefficients)

    return objective


def _in_one_pass_linear(step: _Step) -> Objective:
    """Back-propagate a linear loss at once: its coefficients are constants, so zeros serve as log-probs."""

    def objective(index: int, head: Head) -> tuple[Tensor, Payload]:
        micro = step.micro.batches[index]
        coefficients = _moved(_local_coefficients(step, micro, torch.zeros(len(micro.target_N))), step.engine.device)
        value, output = head.weighted(coefficients.token_N, accuracy=step.traits.accuracy)
        share = None
        if "loss" in coefficients.sums:  # of a token-level loss: computed at zero log-probs, so replaced
            share = (coefficients.token_N.to(output.logp_N.dtype) * output.logp_N.detach()).sum()
        return value, payload(output, coefficients, share=share)

    return objective


def _current_scores(step: _Step) -> list[TokenLogp]:
    """Return log-probs and lse [N] of this rank's micro-batches from scores under the current weights."""
    current = step.batch.current
    if current is None:
        raise ValueError("known_scores needs scores under the current weights")
    device = step.engine.device
    return [
        TokenLogp(
            to_device(cat_tokens(current[member].logp_N for member in micro.members), device),
            to_device(cat_tokens(current[member].lse_N for member in micro.members), device),
        )
        for micro in step.micro.batches
    ]


def _moved(coefficients: Coefficients, device: torch.device) -> Coefficients:
    return replace(coefficients, token_N=to_device(coefficients.token_N, device))


def _batch_coefficients(step: _Step, known: Sequence[Tensor]) -> Tensor:
    """Return dL/ds [S] of the global batch from the log-probs, on the CPU, of every rank's micro-batches."""
    policy_S = torch.zeros(len(step.batch.sequences), dtype=torch.float64)
    for micro, logp_N in zip(step.micro.batches, known, strict=False):
        policy_S[list(micro.members)] = segment_sum(logp_N, micro.seq_N, len(micro.members))
    policy_S = step.engine.sum_over_data(policy_S).requires_grad_()
    return gradient_of(step.loss(step.scores_at(policy_S)), policy_S, step.cfg)


def _local_coefficients(step: _Step, micro: MicroBatch, logp_N: Tensor) -> Coefficients:
    """Return a micro-batch's coefficients, which must depend on nothing outside it."""
    if step.traits.level == "token":
        return _token_coefficients(step, micro, logp_N)
    policy_S = segment_sum(logp_N.cpu(), micro.seq_N, len(micro.members)).requires_grad_()
    out = step.loss(step.scores_at(policy_S, micro.members), micro.members)
    return _spread(gradient_of(out, policy_S, step.cfg), micro, logp_N)


def _spread(member_S: Tensor, micro: MicroBatch, logp_N: Tensor) -> Coefficients:
    """Give each token the dL/ds of its sequence."""
    return Coefficients(to_device(member_S[micro.seq_N].to(logp_N.dtype), logp_N.device), member_S, {})


def _token_coefficients(step: _Step, micro: MicroBatch, logp_N: Tensor) -> Coefficients:
    policy_T = logp_N.detach().cpu().clone().requires_grad_()
    part = step_tokens(step.scores.part(micro.members), step.batch, micro.members, policy_T)
    out = step.loss(part, micro.members)
    gradient_T = gradient_of(out, policy_T, step.cfg)
    mean_S = segment_sum(gradient_T, micro.seq_N, len(micro.members)) / part.length_S
    sums = {"loss": float(out.loss.detach())} | {name: float(value) for name, value in out.metrics.items()}
    return Coefficients(to_device(gradient_T.to(logp_N.dtype), logp_N.device), mean_S, sums)


def _auxiliary(engine: Engine) -> dict[str, float]:
    """Return the metric of the experts' auxiliary loss, which is part of the reported loss; {} if it is off."""
    return {"aux_loss": engine.aux_loss()} if engine.balances_experts else {}


def _reduced_names(step: _Step, mode: PassMode) -> dict[str, list[str]]:
    """Return the names of numbers to sum over micro-batches; from the traits, so that ranks without a head agree."""
    traits = step.traits
    shares = ["loss", *traits.token_metrics] if traits.level == "token" else []
    entropy = traits.entropy and not (mode == "single_pass" and traits.linear)  # which computes no entropy
    measured = [*["entropy"] * entropy, *["token_accuracy"] * traits.accuracy] if mode != "known_scores" else []
    return {"shares": shares, "measured": measured, "mismatch": ["mismatch"]}


def _reduce(step: _Step, found: Sequence[Read], names: Mapping[str, list[str]]) -> dict[tuple[str, str], Tensor]:
    """Sum the numbers of all data ranks' micro-batches by (kind, name), and those by sequence; one collective."""
    sums = {(kind, name): torch.zeros((), dtype=torch.float64) for kind in names for name in names[kind]}
    policy_S, coefficient_S = (torch.zeros(len(step.batch.sequences), dtype=torch.float64) for _ in range(2))
    for micro, each in zip(step.micro.batches, found, strict=False):
        policy_S[list(micro.members)] = each.policy_S
        coefficient_S[list(micro.members)] = each.coefficient_S
        for kind, name in sums:
            sums[kind, name] += each.sums[kind][name]
    return sum_by_name(
        step.engine, {("sequences", "policy"): policy_S, ("sequences", "coefficient"): coefficient_S} | sums
    )


def _result(step: _Step, payloads: Sequence[Payload], mode: PassMode) -> StepResult:
    """Combine the micro-batches' payloads into the step's result, the same on every rank."""
    engine, batch, names = step.engine, step.batch, _reduced_names(step, mode)
    found = read(batch, step.micro.batches, payloads)
    sums = _reduce(step, found, names)
    policy_S, coefficient_S = sums["sequences", "policy"], sums["sequences", "coefficient"]
    shares, measured = ({name: float(sums[kind, name]) for name in names[kind]} for kind in ("shares", "measured"))
    if step.traits.level == "token":
        value, metrics = shares.pop("loss"), shares
    else:
        out = step.loss(step.scores_at(policy_S))
        value, metrics = float(out.loss), {name: float(metric) for name, metric in out.metrics.items()}
    if mode == "known_scores" and batch.current is not None:
        measured = scored_sums(batch.current, step.traits)
    metrics |= token_means(measured, step.scores.num_tokens) | _auxiliary(engine)
    if batch.on_policy:
        largest = engine.max_over_job(max((each.mismatch_max for each in found), default=0.0))
        metrics |= mismatch_metrics(batch.sequences, float(sums["mismatch", "mismatch"]), largest)
    value += metrics.get("aux_loss", 0.0)
    gap = None
    if mode != "single_pass":
        # torch's maximum keeps a NaN, Python's may drop it.
        gap = engine.max_over_job(float(torch.tensor([0.0, *(each.gap for each in found)]).max()))
    return StepResult(value, metrics, policy_S, coefficient_S, mode, gap, step.micro.padding_fraction)
