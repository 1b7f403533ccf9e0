"""The router of a mixture of experts, with an auxiliary loss that does not depend on how the work is cut.

The loss is coefficient x sum over layers of E x sum_e f_e P_e (Switch Transformer, arXiv 2101.03961, equation 4): f_e
the share of (token, choice) pairs of the global batch that go to expert e, P_e the mean softmax probability of e, both
over real tokens. A forward pass without gradient counts both; the f_e of the whole job then enter the next backward
pass as constants, so that the loss is a sum over tokens. Axes: T token positions on this rank, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class BalancedRouter(TopKRouter):
    """Megatron's router; `counts_2E` and `pull_E` are the engine's to read and to set, and None where it has none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counts_2E: Tensor | None = None  # float64: (token, choice) pairs, sums of probabilities
        self.pull_E: Tensor | None = None  # fp32: the loss's derivative by a real token's probability of each expert

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(weights of the chosen experts, which they are), [T, E] each; padding_mask: what is not counted."""
        probs_TE, chosen_TE = super().routing(logits)
        training = self.training and torch.is_grad_enabled()
        if padding_mask is None or (self.pull_E if training else self.counts_2E) is None:
            return probs_TE, chosen_TE
        real_T1 = ~padding_mask.reshape(-1, 1)
        softmax_TE = logits.view(-1, logits.shape[-1]).softmax(dim=-1)
        if training:
            assert self.pull_E is not None
            loss = (softmax_TE * real_T1 * self.pull_E).sum()
            return MoEAuxLossAutoScaler.apply(probs_TE, loss), chosen_TE
        if not self.training and self.counts_2E is not None:
            self.counts_2E += torch.stack(
                [(one * real_T1).sum(dim=0, dtype=torch.float64) for one in (chosen_TE, softmax_TE)]
            )
        return probs_TE, chosen_TE
