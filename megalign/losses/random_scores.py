"""Draws small random scores that fit a loss's traits, and splits them into parts as a step does.

Axes: S sequences, T scored tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megalign.data.group import Pairing
from megalign.losses.base import Scores, Traits


def roles_of(pairing: Pairing) -> list[list[str]]:
    """Return the roles of each group's sequences: several groups, ragged where the pairing allows it."""
    if pairing.kind == "single":
        return [["response"]] * 6
    if pairing.kind == "preference":
        return [["rejected", "chosen"], ["chosen", "rejected"]] * 2 + [["chosen", "rejected"]]
    if pairing.kind == "samples":
        return [["response"] * k for k in (2, 5, 3, 4, 2)]
    strong, weak = max(pairing.strong, 1), pairing.weak
    most: list[str] = ["strong"] * strong + ["positive"] + ["weak"] * weak
    return [most, ["positive", "strong"], ["strong", "positive", *most[strong + 1 :]], most[strong - 1 :]]


def random_scores(traits: Traits, *, seed: int = 0, rewards: bool | None = None) -> Scores:
    """Return the scores of a whole global batch, in float64; fields that the traits do not need are None.

    rewards: whether responses have rewards; None: if the pairing is samples.
    """
    draw = torch.Generator().manual_seed(seed)
    members = [(group, role) for group, roles in enumerate(roles_of(traits.pairing)) for role in roles]
    num_sequences = len(members)
    length_S = torch.randint(1, 7, (num_sequences,), generator=draw)
    length_S[:2] = torch.tensor([1, 6])
    seq_T = torch.arange(num_sequences).repeat_interleave(length_S)

    def near(base_T: Tensor, spread: float) -> Tensor:
        return base_T + spread * torch.randn(len(seq_T), generator=draw, dtype=torch.float64)

    def total(value_T: Tensor) -> Tensor:
        return value_T.new_zeros(num_sequences).index_add(0, seq_T, value_T)

    # Log-probs stay well below 0, where a probability's complement has a logarithm.
    reference_T = near(torch.full((len(seq_T),), -2.5, dtype=torch.float64), 0.3)
    old_T = near(reference_T, 0.1)
    policy_T = near(old_T, 0.15)
    reward_S = torch.randn(num_sequences, generator=draw, dtype=torch.float64)
    reward_S[torch.tensor([role == "weak" for _, role in members])] = torch.nan
    has_rewards = traits.pairing.kind == "samples" if rewards is None else rewards
    by_token = traits.level == "token"
    return Scores(
        policy_S=torch.zeros_like(reward_S) if by_token else total(policy_T),
        group_S=torch.tensor([group for group, _ in members]),
        length_S=length_S,
        role_S=tuple(role for _, role in members),
        num_groups=members[-1][0] + 1,
        num_sequences=num_sequences,
        num_tokens=len(seq_T),
        reference_S=total(reference_T) if traits.reference else None,
        old_S=total(old_T) if traits.old else None,
        reward_S=reward_S if has_rewards else None,
        teacher_S=total(near(old_T, 0.2)) / length_S if traits.teachers else None,
        policy_T=policy_T if by_token else None,
        old_T=old_T if by_token and traits.old else None,
        reference_T=reference_T if by_token and traits.reference else None,
        seq_T=seq_T if by_token else None,
    )


def take(scores: Scores, order_S: Tensor, order_T: Tensor | None = None) -> Scores:
    """Select the sequences `order_S` in that order, with their tokens; num_groups and the like stay global.

    order_T: the tokens of these sequences to keep; default: all of them, in their sequences' order.
    """
    rows = scores.part(order_S.tolist())
    if scores.seq_T is None:
        return rows
    if order_T is None:
        order_T = torch.cat([(scores.seq_T == index).nonzero()[:, 0] for index in [*order_S.tolist(), -1]])
    new_S = torch.zeros(len(scores.role_S), dtype=torch.int64)
    new_S[order_S] = torch.arange(len(order_S))
    values = {"policy_T": scores.policy_T, "old_T": scores.old_T, "reference_T": scores.reference_T}
    tokens: dict[str, Any] = {name: value[order_T] for name, value in values.items() if value is not None}
    return replace(rows, seq_T=new_S[scores.seq_T[order_T]], **tokens)


def parts_of(scores: Scores, *, coupled: bool, inside: bool = False) -> list[Scores]:
    """Split a batch in three as micro-batches do: by whole groups where the loss is coupled, else by sequence.

    inside: split each sequence's tokens instead.
    """
    if inside and scores.seq_T is not None:
        third_T, all_S = torch.arange(len(scores.seq_T)) % 3, torch.arange(len(scores.role_S))
        return [take(scores, all_S, (third_T == third).nonzero()[:, 0]) for third in range(3)]
    key_S = scores.group_S if coupled else torch.arange(len(scores.role_S))
    return [take(scores, (key_S % 3 == third).nonzero()[:, 0]) for third in range(3)]
