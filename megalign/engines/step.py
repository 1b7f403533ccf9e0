"""One exact step over any engine: pack sequences into micro-batches and back-propagate sum(coefficient x log-prob).

Axes: S sequences of the global batch, N scored tokens of a micro-batch. The gradient of any loss of sequence or token
log-probs is sum(coefficient x grad log-prob), so a step needs the coefficients before, or while, it runs backward:

- two_pass: pass 1 scores everything, the loss gives the coefficients of the whole global batch, pass 2 runs backward.
- known_scores: the weights have not changed since a scoring pass, so pass 1 is already there.
- single_pass: each micro-batch's coefficients depend on nothing outside it (nothing is coupled, or whole groups fit).

The first step on freshly sampled responses is on policy: the old policy is the present one, so the step's own
log-probs, detached, are the old ones, and the ratio is exactly 1 in every dtype and mode. Losses whose advantages hold
old log-probs are coupled there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megalign.data.batch import MicroBatch
from megalign.engines.engine import Engine, Head
from megalign.engines.loss_inputs import (
    StepBatch,
    batch_scores,
    cat_tokens,
    mismatch,
    mismatch_metrics,
    need,
    part_scores,
    with_sums,
    with_tokens,
)
from megalign.engines.scoring import Cut, Cutting, Scored, cut_batch, score
from megalign.losses.base import LOSSES, LossConfig, Scores, Traits, prepared
from megalign.ops.linear_logp import TokenLogp
from megalign.ops.segments import segment_sum

PassMode = Literal["two_pass", "single_pass", "known_scores"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did, the same on every rank. The gradient itself is in the engine."""

    loss: float
    metrics: Mapping[str, float]
    policy_S: Tensor  # float64 sums before the update
    coefficient_S: Tensor  # float64 dL/ds; for token-level losses the mean over the response's tokens
    pass_mode: PassMode
    pass_gap: float | None
    padding_fraction: float


@dataclass(frozen=True, slots=True)
class _Payload:
    """What the last stage keeps of a micro-batch after its backward."""

    total_S: Tensor  # of its members
    coefficient_S: Tensor
    share: tuple[float, ...]
    gap: float
    seen: tuple[float, float]  # sums of entropy and of correct tokens, NaN where not asked for
    mismatch: tuple[float, float]  # sum and maximum by token of |log-prob - behaviour log-prob|


# (place, detached log-probs) -> (coefficient of each token, dL/ds of each member, shares of the loss and its metrics)
_Coefficients = Callable[[int, Tensor], tuple[Tensor, Tensor, tuple[float, ...]]]


def accumulate(
    engine: Engine, batch: StepBatch, loss: LossConfig, *, cutting: Cutting, mode: PassMode | None = None
) -> StepResult:
    """Put the exact gradient of the global batch's loss into the engine, by the cheapest mode or the one given.

    Raises ValueError for a mode that is not exact here.
    """
    traits = loss.traits()
    coupled = is_coupled(traits, on_policy=batch.on_policy)
    cut = cut_batch(engine, batch.sequences, coupled=coupled, cutting=cutting)
    mode = mode or _cheapest(engine, batch, coupled=coupled and not cut.whole_groups)
    if engine.balances_experts and mode != "two_pass":
        raise ValueError(f"{mode} does not know the experts' shares of tokens; an auxiliary loss needs two_pass")
    known_old = not (batch.on_policy and traits.old_in_advantages)
    scores = prepared(batch_scores(batch, loss), loss, with_advantages=known_old)
    known = _known(engine, cut, batch, mode, traits)
    coefficients = _coefficient_function(engine, batch, cut, loss, scores, known)

    def objective(place: int, head: Head) -> tuple[Tensor, _Payload]:
        micro = cut.batches[place]
        gap = 0.0
        if known is not None:
            found = known[place]
            coefficient_N, coefficient_S, share = coefficients(place, found.logp_N)
            value, again = head.weighted(coefficient_N, found.lse_N)
            if len(found.logp_N):
                gap = float((again.logp_N - found.logp_N).abs().where(head.formed_N(), 0.0).max())
        elif traits.linear:
            guess_N = torch.zeros(len(micro.target_N), device=engine.device)
            coefficient_N, coefficient_S, share = coefficients(place, guess_N)
            value, found = head.weighted(coefficient_N, accuracy=traits.accuracy)
            loss_here = float((coefficient_N.to(found.logp_N.dtype) * found.logp_N).sum())
            share = (loss_here, *share[1:])  # the share at zero log-probs is not the loss
        else:
            found = head.logp(entropy=traits.entropy, accuracy=traits.accuracy)
            coefficient_N, coefficient_S, share = coefficients(place, found.logp_N.detach())
            value = (coefficient_N * found.logp_N).sum()
        logp_N = found.logp_N
        seq_N = micro.seq_N.to(logp_N.device)
        total_S = segment_sum(logp_N.detach(), seq_N, len(micro.members)).cpu()
        members = [batch.sequences[place] for place in micro.members]
        gaps = mismatch(members, logp_N.detach().cpu()) if batch.on_policy else (0.0, 0.0)
        return value, _Payload(total_S, coefficient_S, share, gap, _sums(found), gaps)

    payloads = engine.backward(cut.batches, objective)
    return _result(engine, batch, cut, loss, scores, payloads, mode)


def evaluate(engine: Engine, batch: StepBatch, loss: LossConfig, *, cutting: Cutting) -> StepResult:
    """Loss and metrics of a global batch under the engine's weights; nothing is accumulated."""
    traits = loss.traits()
    token_level = traits.level == "token"
    current = score(
        engine,
        batch.sequences,
        coupled=traits.coupled,
        cutting=cutting,
        by_token=token_level,
        entropy=traits.entropy,
        accuracy=traits.accuracy,
    )
    scores = prepared(batch_scores(batch, loss), loss)
    total_S = torch.tensor([one.total for one in current], dtype=torch.float64)
    tokens = cat_tokens(current) if token_level else None
    scores = with_tokens(replace(scores, policy_S=total_S), batch, range(len(current)), tokens)
    out = LOSSES[loss.name].function(scores, loss)
    metrics = {name: float(value) for name, value in out.metrics.items()} | _reported(_totals(current), scores, traits)
    metrics |= _auxiliary(engine)
    value = float(out.loss) + metrics.get("aux_loss", 0.0)
    padding = cut_batch(engine, batch.sequences, coupled=traits.coupled, cutting=cutting).padding_fraction
    return StepResult(value, metrics, total_S, torch.zeros_like(total_S), "two_pass", None, padding)


def is_coupled(traits: Traits, *, on_policy: bool) -> bool:
    """Whether a sequence's coefficient depends on other sequences' log-probs under the present weights."""
    return traits.coupled or (on_policy and traits.old_in_advantages)


def _cheapest(engine: Engine, batch: StepBatch, *, coupled: bool) -> PassMode:
    if engine.balances_experts:
        return "two_pass"
    if batch.current is not None:
        return "known_scores"
    return "two_pass" if coupled else "single_pass"


def _known(engine: Engine, cut: Cut, batch: StepBatch, mode: PassMode, traits: Traits) -> list[TokenLogp] | None:
    """Log-probs and lse [N] of each of this rank's micro-batches where the mode has them before backward."""
    if mode == "single_pass":
        return None
    if mode == "two_pass":
        return engine.forward(cut.batches, entropy=traits.entropy, accuracy=traits.accuracy)
    if batch.current is None:
        raise ValueError("known_scores needs scores under the present weights")
    current = batch.current
    empty = torch.zeros(0)
    return [
        TokenLogp(
            torch.cat([empty, *(need(current[place].logp_N) for place in micro.members)]).to(engine.device),
            torch.cat([empty, *(need(current[place].lse_N) for place in micro.members)]).to(engine.device),
        )
        for micro in cut.batches
    ]


def _sums(found: TokenLogp) -> tuple[float, float]:
    """Return (entropy, correct tokens) summed over a micro-batch, NaN where not asked for."""
    entropy, correct = (
        float("nan") if value_N is None else float(value_N.detach().double().sum())
        for value_N in (found.entropy_N, found.correct_N)
    )
    return entropy, correct


def _auxiliary(engine: Engine) -> dict[str, float]:
    """The experts' auxiliary loss, which is part of the reported one, where it is on."""
    return {"aux_loss": engine.aux_loss()} if engine.balances_experts else {}


def _totals(scored: Sequence[Scored]) -> tuple[float, float]:
    """Return (entropy, correct tokens) summed over sequences that are scored already, NaN where not asked for."""
    nan = float("nan")
    return (
        sum(nan if one.entropy is None else one.entropy for one in scored),
        sum(nan if one.num_correct is None else one.num_correct for one in scored),
    )


def _reported(sums: Sequence[float], scores: Scores, traits: Traits) -> dict[str, float]:
    """What the loss reports of the distributions, means over the global batch's scored tokens."""
    found = {"entropy": sums[0]} if traits.entropy else {}
    found |= {"token_accuracy": sums[1]} if traits.accuracy else {}
    return {name: value / scores.num_tokens for name, value in found.items() if value == value}


def _differentiate(scores: Scores, loss: LossConfig, leaf: Tensor) -> tuple[Tensor, tuple[float, ...]]:
    """(d loss / d leaf, (loss, metrics in the order of their names))."""
    out = LOSSES[loss.name].function(scores, loss)
    gradient = torch.zeros_like(leaf)
    if out.loss.requires_grad:
        gradient = torch.autograd.grad(out.loss, leaf)[0]
    return gradient, (float(out.loss.detach()), *(float(out.metrics[name]) for name in sorted(out.metrics)))


def _coefficient_function(
    engine: Engine,
    batch: StepBatch,
    cut: Cut,
    loss: LossConfig,
    scores: Scores,
    known: list[TokenLogp] | None,
) -> _Coefficients:
    """How a micro-batch's log-probs become its tokens' coefficients."""
    if loss.traits().level == "token":
        return lambda place, logp_N: _token_coefficients(batch, cut.batches[place], loss, scores, logp_N)
    if known is None:
        return lambda place, logp_N: _local_coefficients(batch, cut.batches[place], loss, scores, logp_N)
    total_S = torch.zeros(len(batch.sequences), dtype=torch.float64)
    for micro, found in zip(cut.batches, known, strict=False):
        total_S[list(micro.members)] = segment_sum(found.logp_N.cpu(), micro.seq_N, len(micro.members))
    total_S = engine.sum_over_data(total_S).requires_grad_()
    coefficient_S, _ = _differentiate(with_sums(scores, batch, total_S), loss, total_S)

    def of_members(place: int, logp_N: Tensor) -> tuple[Tensor, Tensor, tuple[float, ...]]:
        micro = cut.batches[place]
        mine_S = coefficient_S[list(micro.members)]
        return mine_S[micro.seq_N].to(logp_N.device, logp_N.dtype), mine_S, ()

    return of_members


def _local_coefficients(
    batch: StepBatch, micro: MicroBatch, loss: LossConfig, scores: Scores, logp_N: Tensor
) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    total_S = segment_sum(logp_N.cpu(), micro.seq_N, len(micro.members)).requires_grad_()
    coefficient_S, _ = _differentiate(with_sums(part_scores(scores, micro.members), batch, total_S), loss, total_S)
    return coefficient_S[micro.seq_N].to(logp_N.device, logp_N.dtype), coefficient_S, ()


def _token_coefficients(
    batch: StepBatch, micro: MicroBatch, loss: LossConfig, scores: Scores, logp_N: Tensor
) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    policy_T = logp_N.detach().cpu().clone().requires_grad_()
    part = with_tokens(part_scores(scores, micro.members), batch, micro.members, policy_T)
    gradient_T, share = _differentiate(part, loss, policy_T)
    mean_S = segment_sum(gradient_T, micro.seq_N, len(micro.members)) / part.length_S
    return gradient_T.to(logp_N.device, logp_N.dtype), mean_S, share


def _result(
    engine: Engine,
    batch: StepBatch,
    cut: Cut,
    loss: LossConfig,
    scores: Scores,
    payloads: Sequence[_Payload],
    mode: PassMode,
) -> StepResult:
    """Put the micro-batches' parts together, alike on every rank."""
    count = len(batch.sequences)
    total_S, coefficient_S = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    traits = loss.traits()
    names = _share_names(batch, loss, scores) if traits.level == "token" else []
    share, seen = torch.zeros(1 + len(names), dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for micro, payload in zip(cut.batches, payloads, strict=False):
        total_S[list(micro.members)] = payload.total_S
        coefficient_S[list(micro.members)] = payload.coefficient_S.double()
        share += torch.tensor(payload.share, dtype=torch.float64) if traits.level == "token" else 0
        seen += torch.tensor((*payload.seen, payload.mismatch[0]), dtype=torch.float64)
    total_S, coefficient_S, share, seen = engine.sum_over_data(torch.cat((total_S, coefficient_S, share, seen))).split(
        (count, count, len(share), 3)
    )
    if traits.level == "token":
        value, metrics = float(share[0]), dict(zip(names, share[1:].tolist(), strict=True))
    else:
        out = LOSSES[loss.name].function(with_sums(scores, batch, total_S), loss)
        value, metrics = float(out.loss), {name: float(metric) for name, metric in out.metrics.items()}
    sums = _totals(batch.current) if mode == "known_scores" and batch.current is not None else seen[:2].tolist()
    metrics |= _reported(sums, scores, traits) | _auxiliary(engine)
    if batch.on_policy:
        largest = engine.max_over_job(max((payload.mismatch[1] for payload in payloads), default=0.0))
        metrics |= mismatch_metrics(batch.sequences, float(seen[2]), largest)
    value += metrics.get("aux_loss", 0.0)
    gap = None
    if mode != "single_pass":
        # torch's maximum keeps a NaN, Python's may drop it.
        gap = engine.max_over_job(float(torch.tensor([0.0, *(payload.gap for payload in payloads)]).max()))
    return StepResult(value, metrics, total_S, coefficient_S, mode, gap, cut.padding_fraction)


def _share_names(batch: StepBatch, loss: LossConfig, scores: Scores) -> list[str]:
    """The metrics of a token-level loss, learnt from an empty share, so that ranks without a head know them too."""
    empty = with_tokens(part_scores(scores, ()), batch, (), torch.zeros(0))
    return sorted(LOSSES[loss.name].function(empty, loss).metrics)
