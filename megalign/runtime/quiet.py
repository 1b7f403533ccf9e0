"""Silences warnings that libraries give at every start and that no user of megalign can act on."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Mapping

OPTIONAL = {"TransformerEngine": "transformer_engine", "Apex": "apex"}  # what Megatron would compute with, and imports


def quiet_imports() -> None:
    """Leave out what Megatron's modules say of absent packages when they are imported; `missing_packages` tells it."""
    absent = r"(Transformer Engine and Apex are|Apex is|Transformer Engine is) not installed"
    warnings.filterwarnings("ignore", message=absent, module=r"megatron\.core")


def missing_packages(packages: Mapping[str, str] = OPTIONAL) -> list[str]:
    """Those of the packages, {name: module}, that are not installed."""
    return [name for name, module in packages.items() if importlib.util.find_spec(module) is None]


def quiet_libraries() -> None:
    """Leave out all of Megatron's warnings, and torch's about names Megatron still calls; for a job's own process."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)  # of MLPs not its own
