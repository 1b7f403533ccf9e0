"""Silences warnings that libraries give at every start and that no user of megalign can act on."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Mapping

OPTIONAL = {"TransformerEngine": "transformer_engine", "Apex": "apex"}  # {name: module} that Megatron uses if installed


def quiet_imports() -> None:
    """Suppress Megatron's import warnings about absent packages, which `missing_packages` names."""
    absent = r"(Transformer Engine and Apex are|Apex is|Transformer Engine is) not installed"
    warnings.filterwarnings("ignore", message=absent, module=r"megatron\.core")


def missing_packages(packages: Mapping[str, str] = OPTIONAL) -> list[str]:
    """Return the names of the packages, {name: module}, that are not installed."""
    return [name for name, module in packages.items() if importlib.util.find_spec(module) is None]


def quiet_libraries() -> None:
    """Suppress Megatron's warnings and torch's about deprecated names that Megatron calls; for a job's own process."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # It warns of MLPs of other classes than Megatron's own.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
