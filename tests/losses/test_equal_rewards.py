"""Groups of equal rewards teach nothing, to the bit, however the numbers were computed; small differences stay."""

from __future__ import annotations

import pytest
import torch

from megalign.data.group import same_rewards, without_rounding
from megalign.losses.grpo import GrpoConfig, grpo_advantages
from megalign.losses.gvpo import GvpoConfig, gvpo
from megalign.losses.rloo import RlooConfig, rloo_advantages
from tests.support.slow_losses import make_scores

GRPO = {
    "grpo": GrpoConfig(),
    "dapo": GrpoConfig(variant="dapo"),
    "dr_grpo": GrpoConfig(variant="dr_grpo", max_response_length=9),
}
# In binary the mean of three 0.1 is not 0.1, 0.1 + 0.2 is not 0.3, and ten 0.1 are not 1.
EQUAL = {
    "a tenth": [0.1, 0.1, 0.1],
    "seven": [0.7] * 7,
    "a thousand": [1e-3 / 3] * 1000,
    "large": [123456.7] * 6,
    "negative": [-1.1, -1.1, -1.1],
    "zero": [0.0, 0.0, -0.0],
    "sums": [0.1 + 0.2, 0.3, 0.3],
    "longer sums": [sum([0.1] * 10), 1.0, sum([0.01] * 100)],
}
DIFFERENT = {
    "near": [1.0, 1.0, 1.0 + 1e-12],
    "tiny": [1e-300, 2e-300, 1e-300],
    "near nothing": [0.0, 1e-18, 0.0],
    "far": [1e9, 1e9, 1e9 + 1e-3],
}


def scores_of(*groups: list[float]):
    """On policy: old, reference and policy are the same."""
    reward = [one for rewards in groups for one in rewards]
    group = [number for number, rewards in enumerate(groups) for _ in rewards]
    logp = [-1.0 - place / 7 for place in range(len(reward))]
    return make_scores(policy=logp, old=logp, reference=logp, reward=reward, group=group)


def weights(scores):
    """{loss: what each sequence's gradient is weighed by}; GVPO's is the gradient itself."""
    found = {name: grpo_advantages(scores, cfg) for name, cfg in GRPO.items()}
    for beta in (0.0, 0.05):
        found[f"rloo {beta}"] = rloo_advantages(scores, RlooConfig(beta=beta))
    found["gvpo"] = -torch.autograd.grad(gvpo(scores, GvpoConfig()).loss, scores.policy_S)[0]
    return found


@pytest.mark.parametrize("name", EQUAL)
def test_equal_rewards_have_no_advantage_at_all(name):
    for loss, weight_S in weights(scores_of([0.0, 1.0], EQUAL[name], [3.0, 5.0])).items():
        assert not weight_S[2:-2].any(), loss
        assert weight_S[:2].all() and weight_S[-2:].all(), loss
    assert same_rewards(EQUAL[name]) and len(set(without_rounding(EQUAL[name]))) == 1


@pytest.mark.parametrize("name", DIFFERENT)
def test_small_differences_stay(name):
    """The better response is above the mean, and differences are those of exact arithmetic."""
    rewards = torch.tensor(DIFFERENT[name], dtype=torch.float64)
    best = int(rewards.argmax())
    found = weights(scores_of(DIFFERENT[name]))
    gap = float(rewards.max() - rewards.min())
    assert float(found["dr_grpo"][best]) == pytest.approx(gap * 2 / 3, rel=1e-3)
    assert float(found["rloo 0.0"][best]) == pytest.approx(gap, rel=1e-3)
    for loss, weight_S in found.items():
        assert weight_S[best] > 0 or gap < 1e-100, loss
    assert not same_rewards(DIFFERENT[name]) and without_rounding(DIFFERENT[name]) == DIFFERENT[name]


def test_policies_that_moved_are_pulled_back_alike():
    """GVPO's other half, the implicit rewards, counts in a group of equal rewards: 0.1 * [1, -1] has no other pull."""
    scores = make_scores(policy=[-1.0, -3.0], reference=[-2.0, -2.0], reward=[0.1 + 0.2, 0.3], group=[0, 0])
    gradient_S = torch.autograd.grad(gvpo(scores, GvpoConfig(beta=0.1)).loss, scores.policy_S)[0]
    assert gradient_S.tolist() == pytest.approx([0.01, -0.01], rel=1e-12)


def test_rewards_beside_others():
    assert without_rounding([0.1 + 0.2, 1.0, 0.3]) == [0.3, 1.0, 0.3]
    assert without_rounding([2.0, -1.0, 2.0]) == [2.0, -1.0, 2.0]
    assert without_rounding([]) == [] and not same_rewards([])
