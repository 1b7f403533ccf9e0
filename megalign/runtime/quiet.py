"""Silences warnings that libraries give at every start and that no user of megalign can act on."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Leave out Megatron's about optional packages it does without, and torch's about names Megatron still calls."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)  # of MLPs not its own
