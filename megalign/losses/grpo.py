"""GRPO and its Dr.GRPO and DAPO variants. Axes: S sequences, T scored tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)
from torch import Tensor

from megalign.data.group import Pairing
from megalign.losses.base import LossConfig, LossOut, Scores, Traits, loss
from megalign.losses.clipping import bounded_exp, clipped_loss
from megalign.losses.group_means import center_rewards, group_sum


class GrpoConfig(LossConfig):
    name: Literal["grpo"] = "grpo"
    variant: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    """Form of the loss: grpo, dr_grpo (no division by deviation and length) or dapo (mean over all tokens, higher
    clip)."""
    beta: NonNegativeFloat = 0.0
    """Weight of the k3 estimate of KL(policy, reference), e^d - d - 1 with d = log(reference / policy) by token; 0
    needs no reference."""
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Distance below 1 at which the ratio to the old policy is clipped."""
    clip_high: PositiveFloat = 0.2
    """Distance above 1 at which the ratio is clipped; 0.28 for dapo unless given."""
    max_response_length: PositiveInt | None = None
    """Tokens that dr_grpo divides a response's sum by; required there, refused elsewhere."""

    @model_validator(mode="before")
    @classmethod
    def _dapo_clips_higher(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("variant") == "dapo":
            return {"clip_high": 0.28, **raw}
        return raw

    @field_validator("max_response_length")
    @classmethod
    def _only_for_dr_grpo(cls, value: int | None, info: ValidationInfo) -> int | None:
        variant = info.data.get("variant")
        if variant == "dr_grpo" and value is None:
            raise ValueError("variant dr_grpo requires it, a number of tokens above 0")
        if variant in ("grpo", "dapo") and value is not None:
            raise ValueError(f"only variant dr_grpo takes it, and variant is {variant}")
        return value

    def traits(self) -> Traits:
        names = ("reward_mean", "advantage_sq", "clip_fraction", *["kl"] * (self.beta != 0))
        return Traits(
            Pairing("samples"), level="token", reference=self.beta != 0, old=True, entropy=True, token_metrics=names
        )


def grpo_advantages(scores: Scores, cfg: GrpoConfig) -> Tensor:
    """Return float64 [S]: reward less the group's mean, divided by its unbiased deviation unless dr_grpo."""
    assert scores.reward_S is not None
    centred_S = center_rewards(scores.reward_S, scores.group_S, scores.num_groups)
    if cfg.variant == "dr_grpo":
        return centred_S
    variance_S = group_sum(centred_S.square(), scores.group_S, scores.num_groups) / (scores.sizes() - 1)
    return centred_S / (variance_S.sqrt() + 1e-4)


def _token_weight(scores: Scores, cfg: GrpoConfig) -> Tensor:
    """Return float64 [S]: the weight of one token of a sequence in the step's loss, global divisor inside."""
    one_S = torch.ones_like(scores.length_S, dtype=torch.float64)
    if cfg.variant == "dapo":
        return one_S / scores.num_tokens
    share_S = one_S / (scores.num_groups * scores.sizes())
    return share_S / (cfg.max_response_length or scores.length_S)


@loss(GrpoConfig, prepare=grpo_advantages)
def grpo(scores: Scores, cfg: GrpoConfig) -> LossOut:
    """Return the clipped surrogate by token plus beta times k3 against the reference, in the variant's mean.

    The loss is a sum over tokens, so even one sequence's tokens may be split over micro-batches. Metrics: clip_fraction
    is of tokens; kl, where a reference is used, is the mean of k3 in nats a token.
    """
    assert scores.policy_T is not None and scores.old_T is not None and scores.seq_T is not None
    assert scores.reward_S is not None
    advantage_S = grpo_advantages(scores, cfg) if scores.advantage_S is None else scores.advantage_S
    seq_T, policy_T = scores.seq_T, scores.policy_T.double()
    log_ratio_T = policy_T - scores.old_T.double()
    loss_T, clipped_T = clipped_loss(log_ratio_T, advantage_S[seq_T], low=cfg.clip_low, high=cfg.clip_high)
    each_S = 1 / (scores.length_S.double() * scores.num_sequences)
    metrics = {
        "reward_mean": (scores.reward_S * each_S)[seq_T].sum(),
        "advantage_sq": (advantage_S.square() * each_S)[seq_T].sum(),
        "clip_fraction": clipped_T.double().sum() / scores.num_tokens,
    }
    if cfg.beta:
        assert scores.reference_T is not None
        behind_T = scores.reference_T.double() - policy_T
        k3_T = bounded_exp(behind_T) - behind_T - 1
        loss_T = loss_T + cfg.beta * k3_T
        metrics["kl"] = k3_T.detach().sum() / scores.num_tokens
    return LossOut((loss_T * _token_weight(scores, cfg)[seq_T]).sum(), metrics)
