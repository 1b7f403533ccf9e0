"""Registers the losses, one module each: importing this package imports every module in it."""

from megalign.data.group import Pairing
from megalign.losses.base import (
    LOSSES,
    Loss,
    LossConfig,
    LossOut,
    Scores,
    Traits,
    choose_loss,
    loss,
    loss_function,
    prepared,
)
from megalign.modules import import_modules

import_modules(__name__, __path__)

__all__ = [
    "LOSSES",
    "Loss",
    "LossConfig",
    "LossOut",
    "Pairing",
    "Scores",
    "Traits",
    "choose_loss",
    "loss",
    "loss_function",
    "prepared",
]
