"""Checks a loss on small random scores: its gradient, and the properties that steps rely on in every layout.

Axes: S sequences, T scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megalign.losses.base import LossConfig, LossOut, Scores, find_loss, loss_function, prepared
from megalign.losses.random_scores import parts_of, random_scores, take
from megalign.schema import UserError, reason_of

STEP = 1e-5  # step size of finite differences
# Relative to the largest of a gradient: far above what float64's rounding does to a finite difference of a loss of that
# size (1e-16 / STEP), below what fp32's does (6e-8 / STEP).
SAME_SLOPE = 1e-4
FAR = 1e3  # nats, between a policy and a distant reference
LARGEST = 1e19  # a gradient above it overflows the square in an fp32 norm


@dataclass(frozen=True, slots=True)
class Result:
    """Holds the result of one check: `problem` is empty if it passed, else says what is wrong and what to do."""

    name: str
    about: str
    problem: str


class Subject:
    """Calls a loss with its settings as a step does, on small random scores."""

    def __init__(self, cfg: LossConfig) -> None:
        self.cfg, self.traits, self.function = cfg, cfg.traits(), loss_function(cfg)
        self.leaf = "policy_T" if self.traits.level == "token" else "policy_S"
        self.scores = random_scores(self.traits)

    def prepared(self, scores: Scores) -> Scores:
        """Fill in group sizes and advantages."""
        return prepared(scores, self.cfg)

    def at(self, scores: Scores, leaf: Tensor) -> Scores:
        """Put other log-probs of the policy into scores."""
        return replace(scores, policy_T=leaf) if self.leaf == "policy_T" else replace(scores, policy_S=leaf)

    def run(self, scores: Scores) -> tuple[LossOut, Tensor]:
        """Return the loss's result and its gradient with respect to the policy's log-probs; zeros without one."""
        leaf: Tensor = getattr(scores, self.leaf).detach().clone().requires_grad_()
        out = self.function(self.at(scores, leaf), self.cfg)
        if not out.loss.requires_grad:
            return out, torch.zeros_like(leaf)
        try:
            gradient = torch.autograd.grad(out.loss, leaf, allow_unused=True)[0]
        except RuntimeError as error:
            raise UserError(f"its gradient cannot be computed: {reason_of(error)}") from error
        return out, torch.zeros_like(leaf) if gradient is None else gradient

    def value(self, scores: Scores, leaf: Tensor) -> float:
        """Return the loss at other log-probs of the policy."""
        return float(self.function(self.at(scores, leaf), self.cfg).loss.detach())


def near(first: Tensor | float, second: Tensor | float, *, rel: float = 1e-9) -> bool:
    """Tell whether two values are equal up to rounding, measured against the larger."""
    a, b = torch.as_tensor(first, dtype=torch.float64), torch.as_tensor(second, dtype=torch.float64)
    size = max(float(value.abs().max()) if value.numel() else 0.0 for value in (a, b))
    return a.shape == b.shape and bool(((a - b).abs() <= rel * size + 1e-12).all())


def _runs(subject: Subject) -> str:
    """The loss gives a finite value on the fields that its traits ask for."""
    try:
        out, gradient = subject.run(subject.prepared(subject.scores))
    except UserError as error:
        missing = [name for name in ("reference", "old", "teacher", "reward") if _is_missing(subject.scores, name)]
        return f"{error}; fields that its traits() leave None: {', '.join(missing) or 'none'}"
    if not out.loss.isfinite() or not gradient.isfinite().all():
        return f"loss {float(out.loss.detach()):g} or its gradient is not finite; must be for ordinary scores"
    if not gradient.any():
        return f"the gradient to {subject.leaf} is zero; must come from {subject.leaf}, without detach()"
    return ""


def _is_missing(scores: Scores, name: str) -> bool:
    return getattr(scores, f"{name}_S") is None


def _gradient(subject: Subject) -> str:
    """Autograd's gradient equals finite differences in float64."""
    scores = subject.prepared(subject.scores)
    _, gradient = subject.run(scores)
    leaf: Tensor = getattr(scores, subject.leaf)
    slow = torch.zeros_like(gradient)
    for index in range(len(leaf)):
        up, down = leaf.clone(), leaf.clone()
        up[index] += STEP
        down[index] -= STEP
        slow[index] = (subject.value(scores, up) - subject.value(scores, down)) / (2 * STEP)
    if near(gradient, slow, rel=SAME_SLOPE):
        return ""
    worst = int((gradient - slow).abs().argmax())
    return (
        f"at {subject.leaf}[{worst}] autograd has {float(gradient[worst]):.6g}, finite differences "
        f"{float(slow[worst]):.6g}; must agree: look for detach(), .item(), or a sum below float64"
    )


def _precision(subject: Subject) -> str:
    """The loss is summed in float64, also where log-probs by token come in fp32."""
    scores = subject.prepared(subject.scores)
    single = {name: value.float() for name, value in _tensors(scores) if name in ("policy_T", "old_T", "reference_T")}
    out, _ = subject.run(replace(scores, **single))  # type: ignore[arg-type]
    if out.loss.dtype != torch.float64:
        return f"the loss is {out.loss.dtype}; must be float64: scores.policy_T.double(), and no float()"
    return ""


def _parts(subject: Subject) -> str:
    """The loss over parts of the batch adds up to the loss of the whole, and so do its gradients."""
    scores, coupled = subject.prepared(subject.scores), subject.traits.coupled
    whole, gradient = subject.run(scores)
    splits = {"groups" if coupled else "sequences": False} | ({"tokens": True} if subject.leaf == "policy_T" else {})
    for name, inside in splits.items():
        results = [subject.run(part) for part in parts_of(scores, coupled=coupled, inside=inside)]
        total = sum(float(out.loss.detach()) for out, _ in results)
        if not near(total, float(whole.loss.detach())):
            return (
                f"over parts by {name} it adds up to {total:.6g}, the whole is {float(whole.loss.detach()):.6g}; must "
                "be equal: sum, then divide by scores.num_groups, num_sequences or num_tokens, never mean() or len()"
                + ("" if coupled else "; what looks across sequences needs coupled=True or `prepare`")
            )
        number = torch.arange(len(gradient), dtype=torch.float64)
        numbered = parts_of(subject.at(scores, number), coupled=coupled, inside=inside)
        for (_, mine), indices in zip(results, numbered, strict=True):
            if not near(mine, gradient[getattr(indices, subject.leaf).long()]):
                return (
                    f"the gradient of a part by {name} is not the whole's; must be: a sequence's gradient may depend "
                    "on others only with coupled=True, or through `prepare`"
                )
    return ""


def _order(subject: Subject) -> str:
    """Neither the order of groups and responses nor the groups' numbers change the loss."""
    draw, scores = torch.Generator().manual_seed(1), subject.scores
    whole, gradient = subject.run(subject.prepared(scores))
    groups_G = torch.randperm(scores.num_groups, generator=draw)
    shuffled_S = torch.randperm(scores.num_sequences, generator=draw)
    backwards_S = torch.arange(scores.num_sequences).flip(0)
    for name, order_S in (("responses", shuffled_S), ("groups", backwards_S)):
        other = take(scores, order_S)
        out, moved = subject.run(subject.prepared(replace(other, group_S=groups_G[other.group_S])))
        number = torch.arange(len(gradient), dtype=torch.float64)
        index = getattr(take(subject.at(scores, number), order_S), subject.leaf).long()
        if not near(out.loss.detach(), whole.loss.detach()) or not near(moved, gradient[index]):
            return (
                f"another order of {name} gives {float(out.loss.detach()):.6g} instead of "
                f"{float(whole.loss.detach()):.6g}, or another gradient; must not matter: use group_S and role_S"
            )
    return ""


def _untouched(subject: Subject) -> str:
    """The loss changes none of the tensors it is given."""
    scores = subject.prepared(subject.scores)
    before = {name: value.clone() for name, value in _tensors(scores)}
    with torch.no_grad():
        subject.function(scores, subject.cfg)
    for name, value in _tensors(scores):
        if not torch.equal(value.nan_to_num(), before[name].nan_to_num()):
            return f"it writes into scores.{name}; must leave it alone: no operations that end in _, no +="
    return ""


def _tensors(scores: Scores) -> Iterator[tuple[str, Tensor]]:
    for field in fields(Scores):
        value = getattr(scores, field.name)
        if isinstance(value, Tensor):
            yield field.name, value


def _metrics(subject: Subject) -> str:
    """Metrics are finite and without gradient; those of token losses have the same names in every part."""
    scores, coupled = subject.prepared(subject.scores), subject.traits.coupled
    metrics = subject.run(scores)[0].metrics
    for name, value in metrics.items():
        if value.requires_grad:
            return f"{name} carries a gradient; must be detached"
        if not value.isfinite():
            return f"{name} is {float(value):g}; must be finite, or left out"
    if subject.leaf == "policy_S":
        return ""
    declared = sorted(subject.traits.token_metrics)
    if sorted(metrics) != declared:
        return f"the metrics are {sorted(metrics)}, token_metrics of the traits {declared}; must be the same"
    split = [parts_of(scores, coupled=coupled, inside=inside) for inside in (False, True)]
    empty = take(scores, torch.zeros(0, dtype=torch.int64))
    for parts in (*split, [scores, empty]):
        by_part = [subject.run(part)[0].metrics for part in parts]
        for part_metrics in by_part:
            if sorted(part_metrics) != sorted(metrics):
                return f"a part has the metrics {sorted(part_metrics)}, the whole {sorted(metrics)}; must be the same"
        for name, value in metrics.items():
            total = sum(float(part_metrics[name]) for part_metrics in by_part)
            if not near(total, value):
                return (
                    f"{name} over parts adds up to {total:.6g}, the whole has {float(value):.6g}; must add up: sum, "
                    "then divide by scores.num_tokens or another global count"
                )
    return ""


def _empty(subject: Subject) -> str:
    """A part without sequences has loss zero."""
    out, gradient = subject.run(take(subject.prepared(subject.scores), torch.zeros(0, dtype=torch.int64)))
    if float(out.loss.detach()) != 0 or gradient.numel():
        return f"without sequences the loss is {float(out.loss.detach()):g}; must be 0: sum instead of mean()"
    return ""


def _equal_rewards(subject: Subject) -> str:
    """Groups whose rewards are all equal, and rewards that only some losses' data have, leave everything finite."""
    scores = random_scores(subject.traits, rewards=subject.traits.pairing.kind != "single")
    cases, reward_S = [scores], scores.reward_S
    if reward_S is not None:
        cases.append(replace(scores, reward_S=reward_S * 0 + 0.3))
    for case in cases:
        out, gradient = subject.run(subject.prepared(case))
        if not out.loss.isfinite() or not gradient.isfinite().all():
            return "the loss or its gradient is not finite where rewards are equal or unknown; must be: guard divisions"
    return ""


def _far(subject: Subject) -> str:
    """Log-probs a thousand nats below the reference, or above, leave loss and gradient finite."""
    scores = subject.prepared(subject.scores)
    leaf: Tensor = getattr(scores, subject.leaf)
    below = subject.at(scores, leaf - FAR * torch.linspace(0, 1, len(leaf), dtype=torch.float64))
    for case in (below, _others_below(scores)):
        out, gradient = subject.run(case)
        if not out.loss.isfinite() or not (gradient.abs() < LARGEST).all():
            return "log-probs far away give a loss or gradient that is not finite; must be: use logsigmoid, logsumexp"
    return ""


def _others_below(scores: Scores) -> Scores:
    """Move the log-probs of reference, old policy and teachers down, by up to a thousand nats."""

    def down(value: Tensor | None) -> Tensor | None:
        return None if value is None else value - FAR * torch.linspace(0, 1, len(value), dtype=torch.float64)

    return replace(
        scores,
        reference_S=down(scores.reference_S),
        old_S=down(scores.old_S),
        teacher_S=down(scores.teacher_S),
        reference_T=down(scores.reference_T),
        old_T=down(scores.old_T),
    )


def _linear(subject: Subject) -> str:
    """A loss that declares linear has a constant gradient and no constant term."""
    scores = subject.prepared(subject.scores)
    out, gradient = subject.run(scores)
    leaf: Tensor = getattr(scores, subject.leaf)
    _, again = subject.run(subject.at(scores, leaf * 0.7 - 1))
    if near(gradient, again) and near(out.loss.detach(), (gradient * leaf).sum()):
        return ""
    return "linear=True, but the loss is not the sum of constant x log-prob; must be, or linear left out"


def _prepare(subject: Subject) -> str:
    """`prepare` gives float64 numbers, whatever the policy's log-probs are."""
    scores = subject.scores
    given = subject.prepared(scores).advantage_S
    if given is None or given.dtype != torch.float64:
        return f"prepare gives {None if given is None else given.dtype}; must be float64"
    blind = subject.prepared(replace(scores, policy_S=scores.policy_S * 0 - 1, policy_T=None)).advantage_S
    if not near(given, blind if blind is not None else given):
        return "prepare looks at the policy's log-probs; must not: they do not exist yet"
    if subject.traits.old_in_advantages:
        whole, alone = (subject.run(case)[0].loss for case in (subject.prepared(scores), scores))
        if not near(whole.detach(), alone.detach()):
            return "with advantage_S None the function gives another loss; must make the advantages itself then"
    return ""


CHECKS: Mapping[str, Callable[[Subject], str]] = {
    "runs": _runs,
    "gradient": _gradient,
    "precision": _precision,
    "parts": _parts,
    "order": _order,
    "inputs": _untouched,
    "metrics": _metrics,
    "empty": _empty,
    "rewards": _equal_rewards,
    "far": _far,
    "linear": _linear,
    "prepare": _prepare,
}


def check_loss(cfg: LossConfig) -> list[Result]:
    """Run every check that applies to a loss; no more after the first if the loss does not even run."""
    subject, results = Subject(cfg), []
    skipped = set() if subject.traits.linear else {"linear"}
    skipped |= set() if find_loss(cfg.name).prepare is not None else {"prepare"}
    for name, check in CHECKS.items():
        if name in skipped:
            continue
        try:
            problem = check(subject)
        except UserError as error:
            problem = str(error)
        results.append(Result(name, (check.__doc__ or "").strip(), problem))
        if name == "runs" and problem:
            break
    return results
