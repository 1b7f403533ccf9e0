"""Losses: one file each; importing this package registers them all."""

from megalign.losses import dpo, epa, grpo, gvpo, poft, rloo, sft
from megalign.losses.base import LOSSES, Loss, LossConfig, LossOut, Scores, Traits, choose_loss, prepared

__all__ = [
    "LOSSES",
    "Loss",
    "LossConfig",
    "LossOut",
    "Scores",
    "Traits",
    "choose_loss",
    "dpo",
    "epa",
    "grpo",
    "gvpo",
    "poft",
    "prepared",
    "rloo",
    "sft",
]
