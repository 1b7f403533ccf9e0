"""Every loss again as plain loops over Python floats, read off the definitions, and ragged batches to compare on.

Each takes the batch, the configuration and the policy's log-probs as a list (by sequence, or by token for SFT and
GRPO), so that a finite difference of it is an independent gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from megalign.losses import Scores


def make_scores(**columns: Any) -> Scores:
    """Scores from lists: policy, group and any of reference, old, reward, teacher, role, length."""
    policy, group = columns.pop("policy"), columns.pop("group")
    length = columns.pop("length", [1] * len(policy))
    role = columns.pop("role", ["response"] * len(policy))
    optional = {f"{name}_S": torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}
    return Scores(
        policy_S=torch.tensor(policy, dtype=torch.float64, requires_grad=True),
        group_S=torch.tensor(group),
        length_S=torch.tensor(length),
        role_S=tuple(role),
        num_groups=len(set(group)),
        num_sequences=len(policy),
        num_tokens=sum(length),
        **optional,
    )


def ragged(roles_by_group: list[list[str]], *, seed: int = 0) -> Scores:
    """A shuffled batch of ragged groups with every field filled, token by token and by sequence."""
    draw = torch.Generator().manual_seed(seed)
    places = [(group, role) for group, roles in enumerate(roles_by_group) for role in roles]
    places = [places[i] for i in torch.randperm(len(places), generator=draw).tolist()]
    num_sequences = len(places)
    length_S = torch.randint(1, 7, (num_sequences,), generator=draw)
    seq_T = torch.repeat_interleave(torch.arange(num_sequences), length_S)

    def logps(spread: float, base_T: torch.Tensor) -> torch.Tensor:
        return base_T + spread * torch.randn(len(seq_T), generator=draw, dtype=torch.float64)

    def by_sequence(value_T: torch.Tensor) -> torch.Tensor:
        return torch.zeros(num_sequences, dtype=torch.float64).index_add(0, seq_T, value_T)

    reference_T = logps(0.8, torch.full((len(seq_T),), -2.0, dtype=torch.float64))
    old_T = logps(0.2, reference_T)
    policy_T = logps(0.2, old_T)
    reward_S = torch.randn(num_sequences, generator=draw, dtype=torch.float64)
    reward_S[torch.tensor([role == "weak" for _, role in places])] = torch.nan
    return Scores(
        policy_S=by_sequence(policy_T),
        group_S=torch.tensor([group for group, _ in places]),
        length_S=length_S,
        role_S=tuple(role for _, role in places),
        num_groups=len(roles_by_group),
        num_sequences=num_sequences,
        num_tokens=len(seq_T),
        reference_S=by_sequence(reference_T),
        old_S=by_sequence(old_T),
        reward_S=reward_S,
        teacher_S=by_sequence(old_T) / length_S,
        policy_T=policy_T,
        old_T=old_T,
        reference_T=reference_T,
        seq_T=seq_T,
    )


SAMPLES = [["response"] * k for k in (2, 5, 3, 4, 2)]
SINGLES = [["response"]] * 4
PAIRS = [["rejected", "chosen"]] * 4
CONTRASTS = [
    ["positive", "strong", "weak", "weak"],
    ["strong", "positive"],
    ["weak", "positive"],
    ["strong", "strong", "strong", "positive", "weak"],
]


def part(scores: Scores, keep_S: torch.Tensor, keep_T: torch.Tensor | None = None) -> Scores:
    """The share of sequences `keep_S`, and of their tokens `keep_T`; divisors stay those of the whole batch."""
    changes = {"role_S": tuple(role for role, keep in zip(scores.role_S, keep_S.tolist()) if keep)}
    keep_T = keep_S[scores.seq_T] if keep_T is None else keep_S[scores.seq_T] & keep_T
    for name in Scores.__dataclass_fields__:
        value = getattr(scores, name)
        if isinstance(value, torch.Tensor):
            changes[name] = value[keep_T if name.endswith("_T") else keep_S]
    place_S = keep_S.cumsum(0) - 1
    return replace(scores, **{**changes, "seq_T": place_S[scores.seq_T][keep_T]})


def rows(scores: Scores, group: int) -> list[int]:
    """Return the indices of a group's sequences."""
    return [i for i, other in enumerate(scores.group_S.tolist()) if other == group]


def mean(values: list[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def over_groups(scores: Scores, one_group: Callable[[list[int]], float]) -> float:
    """Return the mean over groups of a function of their sequences' indices."""
    return mean([one_group(rows(scores, group)) for group in range(scores.num_groups)])


def sft(scores: Scores, cfg: Any, policy: list[float]) -> float:
    """Return the mean negative log-prob by token."""
    return -mean(policy)


def poft(scores: Scores, cfg: Any, policy: list[float]) -> float:
    """Return the mean over groups of -log sigmoid(beta (mean log-prob by token - teachers' score) - gamma)."""
    length, teacher = scores.length_S.tolist(), scores.teacher_S.tolist()

    def one_group(members):
        (i,) = members
        inside = cfg.beta * (policy[i] / length[i] - teacher[i]) - cfg.gamma
        return -math.log(1 / (1 + math.exp(-inside)))

    return over_groups(scores, one_group)


def dpo(scores: Scores, cfg: Any, policy: list[float]) -> float:
    """Return the mean over pairs of DPO's loss, or of IPO's squared distance from 1 / (2 beta)."""
    reference, length = scores.reference_S.tolist(), scores.length_S.tolist()

    def one_group(members):
        c, r = _pair(scores, members)
        chosen, rejected = policy[c] - reference[c], policy[r] - reference[r]
        if cfg.variant == "ipo":
            return (chosen / length[c] - rejected / length[r] - 1 / (2 * cfg.beta)) ** 2
        return math.log(1 + math.exp(-cfg.beta * (chosen - rejected)))

    return over_groups(scores, one_group)


def _pair(scores, members):
    """Return the indices of a group's chosen and rejected response."""
    (chosen,) = [i for i in members if scores.role_S[i] == "chosen"]
    (rejected,) = [i for i in members if scores.role_S[i] == "rejected"]
    return chosen, rejected


def _pair_means(scores, policy, members):
    """Return the mean log-probs by token of the chosen and the rejected response."""
    length = scores.length_S.tolist()
    c, r = _pair(scores, members)
    return policy[c] / length[c], policy[r] / length[r]


def simpo(scores: Scores, cfg: Any, policy: list[float]) -> float:
    """Return the mean over pairs of -log sigmoid(beta (gap of mean log-probs) - gamma)."""

    def one_group(members):
        chosen, rejected = _pair_means(scores, policy, members)
        return math.log(1 + math.exp(cfg.gamma - cfg.beta * (chosen - rejected)))

    return over_groups(scores, one_group)


def orpo(scores: Scores, cfg: Any, policy: list[float]) -> float:
    """Return the mean over pairs of the chosen response's NLL by token plus the weighted log odds ratio's loss."""

    def odds(logp):
        return math.exp(logp) / (1 - math.exp(logp))

    def one_group(members):
        chosen, rejected = _pair_means(scores, policy, members)
        return -chosen + cfg.weight * math.log(1 + odds(rejected) / odds(chosen))

    return over_groups(scores, one_group)


def epa(scores: Scores, cfg: Any, policy: list[float]) -> float:
    """Return the mean over groups of -log of the positive's share of the energies."""
    reference = scores.reference_S.tolist()

    def one_group(members):
        energy = {i: math.exp(cfg.beta * (policy[i] - reference[i])) for i in members}
        (p,) = [i for i in members if scores.role_S[i] == "positive"]
        return -math.log(energy[p] / sum(energy.values()))

    return over_groups(scores, one_group)


def gvpo(scores: Scores, cfg: Any, policy: list[float]) -> float:
    """Return the mean over groups of half the unbiased variance of implicit less true rewards."""
    reference, reward = scores.reference_S.tolist(), scores.reward_S.tolist()

    def one_group(members):
        implicit = {i: cfg.beta * (policy[i] - reference[i]) for i in members}
        mean_implicit, mean_reward = mean(list(implicit.values())), mean([reward[i] for i in members])
        halves = [0.5 * ((implicit[i] - mean_implicit) - (reward[i] - mean_reward)) ** 2 for i in members]
        return sum(halves) / (len(members) - 1)

    return over_groups(scores, one_group)


def clipped(ratio: float, advantage: float, low: float, high: float) -> float:
    """Return -min(rho A, clip(rho) A)."""
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def rloo(scores: Scores, cfg: Any, policy: list[float]) -> float:
    """Return the mean over groups of the clipped surrogate by sequence, with leave-one-out advantages."""
    old, reference = scores.old_S.tolist(), scores.reference_S.tolist()
    penalised = [r - cfg.beta * (o - f) for r, o, f in zip(scores.reward_S.tolist(), old, reference)]

    def one_group(members):
        terms = []
        for i in members:
            advantage = penalised[i] - mean([penalised[j] for j in members if j != i])
            terms.append(clipped(math.exp(policy[i] - old[i]), advantage, cfg.clip, cfg.clip))
        return mean(terms)

    return over_groups(scores, one_group)


def grpo(scores: Scores, cfg: Any, policy: list[float]) -> float:
    """Return the clipped surrogate by token with the k3 penalty, in the means of GRPO, Dr. GRPO or DAPO."""
    reward, seq = scores.reward_S.tolist(), scores.seq_T.tolist()
    old, reference = scores.old_T.tolist(), scores.reference_T.tolist()

    def token_terms(members):
        center = mean([reward[i] for i in members])
        deviation = math.sqrt(sum((reward[i] - center) ** 2 for i in members) / (len(members) - 1))
        for i in members:
            advantage = reward[i] - center
            if cfg.variant != "dr_grpo":
                advantage /= deviation + 1e-4
            terms = []
            for t in [t for t, owner in enumerate(seq) if owner == i]:
                k3 = math.exp(reference[t] - policy[t]) - (reference[t] - policy[t]) - 1
                ratio = math.exp(policy[t] - old[t])
                terms.append(clipped(ratio, advantage, cfg.clip_low, cfg.clip_high) + cfg.beta * k3)
            yield terms

    if cfg.variant == "dapo":
        return mean([x for g in range(scores.num_groups) for terms in token_terms(rows(scores, g)) for x in terms])
    if cfg.variant == "dr_grpo":
        return over_groups(scores, lambda m: sum(map(sum, token_terms(m))) / (len(m) * cfg.max_response_length))
    return over_groups(scores, lambda m: mean([mean(terms) for terms in token_terms(m)]))
