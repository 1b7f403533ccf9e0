"""Computes statistics of groups, each returned at the group's own sequences. Axes: S sequences, G groups.

Sequences of a group need not be neighbours, and groups without a sequence here are fine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalign.data.group import SAME_REWARD

# Centred values below this fraction of the values themselves are rounding, not variation.
ROUNDING = 1e-12


def sequences_per_group(group_S: Tensor, num_groups: int) -> Tensor:
    """Return int64 [S]: how many of these sequences share each one's group."""
    return torch.bincount(group_S, minlength=num_groups)[group_S]


def group_sum(value_S: Tensor, group_S: Tensor, num_groups: int) -> Tensor:
    """Return [S]: the sum over each sequence's group."""
    return value_S.new_zeros(num_groups).index_add(0, group_S, value_S)[group_S]


def group_mean(value_S: Tensor, group_S: Tensor, num_groups: int) -> Tensor:
    """Return [S]: the mean over each sequence's group."""
    return group_sum(value_S, group_S, num_groups) / sequences_per_group(group_S, num_groups)


def center_by_group(value_S: Tensor, group_S: Tensor, num_groups: int) -> Tensor:
    """Return [S]: each value less its group's mean."""
    return value_S - group_mean(value_S, group_S, num_groups)


def center_rewards(reward_S: Tensor, group_S: Tensor, num_groups: int) -> Tensor:
    """Return [S]: each reward less its group's mean; exactly 0 in groups whose rewards only rounding tells apart.

    For numbers without a gradient. The mean of 0.1, 0.1 and 0.1 is not 0.1, and 0.1 + 0.2 is not 0.3.
    """
    low_G, high_G = (reward_S.new_full((num_groups,), bound) for bound in (torch.inf, -torch.inf))
    low_S = low_G.scatter_reduce(0, group_S, reward_S, "amin")[group_S]
    high_S = high_G.scatter_reduce(0, group_S, reward_S, "amax")[group_S]
    equal_S = high_S - low_S <= SAME_REWARD * torch.maximum(low_S.abs(), high_S.abs())
    return center_by_group(reward_S, group_S, num_groups).masked_fill(equal_S, 0.0)


def chosen_less_rejected(value_S: Tensor, chosen_S: Tensor, group_S: Tensor, num_groups: int) -> Tensor:
    """Return [G]: the chosen sequence's value less the rejected one's, for the groups with sequences here."""
    return group_sum(value_S.where(chosen_S, -value_S), group_S, num_groups)[chosen_S]


def group_logsumexp(value_S: Tensor, group_S: Tensor, num_groups: int) -> Tensor:
    """Return [S]: log of the sum of exponentials over each sequence's group, finite for finite values of any size."""
    lowest_G = value_S.new_full((num_groups,), -torch.inf)
    top_S = lowest_G.scatter_reduce(0, group_S, value_S.detach(), "amax")[group_S]
    return group_sum((value_S - top_S).exp(), group_S, num_groups).log() + top_S


def reward_mean(reward_S: Tensor | None) -> dict[str, Tensor]:
    """Return the metric reward_mean, over rewards that are known; {} where none is."""
    known_S = None if reward_S is None else reward_S[~reward_S.isnan()]
    return {} if known_S is None or known_S.numel() == 0 else {"reward_mean": known_S.mean()}


def implicit_reward_fit(
    implicit_S: Tensor, reward_S: Tensor | None, group_S: Tensor, num_groups: int
) -> dict[str, Tensor]:
    """Return slope and Pearson correlation of implicit against true reward as metrics; NaN rewards are unknown.

    Both rewards are centred by group and pooled: theory fixes the implicit one only up to a constant per prompt,
    so comparing prompts would measure that constant. A number that does not exist is left out.
    """
    if reward_S is None:
        return {}
    known_S = ~reward_S.isnan()
    group_S, reward_S, implicit_S = group_S[known_S], reward_S[known_S], implicit_S.detach()[known_S]
    true_S = center_rewards(reward_S, group_S, num_groups)
    own_S = center_by_group(implicit_S, group_S, num_groups)
    true_norm, own_norm = true_S.norm(), own_S.norm()
    if true_norm <= ROUNDING * reward_S.norm():
        return {}
    fit = {"implicit_reward_slope": (true_S @ own_S) / true_norm.square()}
    if own_norm > ROUNDING * implicit_S.norm():
        fit["implicit_reward_correlation"] = (true_S @ own_S) / (true_norm * own_norm)
    return fit
