"""Imports DeepSpeed so that it needs no compiler, prints nothing, and uses the CPU where there is no CUDA device."""

from __future__ import annotations

import functools
import logging
import shutil
import time
import warnings
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from megalign.runtime.cpu_shims import compiled_later

STALE_S = 900.0  # an extension compiles in a few minutes, on a busy machine too


@functools.cache
def deepspeed() -> Any:
    """Import DeepSpeed; later calls return the same module."""
    # Only errors: at each import and start it logs settings and its choice of device.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        module = import_module("deepspeed")
    finally:
        logging.disable(before)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not torch.cuda.is_available():
        # It would compile its own collectives, which takes minutes and fails without a compiler; gloo serves. An empty
        # table, because filling it runs the compiler too.
        import_module("deepspeed.ops").__dict__["__compatible_ops__"] = {}
        with compiled_later():  # which its first step imports, though nothing here calls it
            import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    return module


def can_compile_cpu_adam() -> bool:
    """Tell whether DeepSpeed's CPU Adam, which it compiles at first use, can be compiled here."""
    return _can_compile("CPUAdamBuilder")


def can_use_nvme() -> bool:
    """Tell whether DeepSpeed's access to NVMe, which it compiles at first use, can be compiled here."""
    return _can_compile("AsyncIOBuilder")


@functools.cache
def _can_compile(builder_name: str) -> bool:
    """Tell whether an extension of DeepSpeed can be compiled; drop the locks that killed compilations left."""
    if shutil.which("g++") is None or shutil.which("ninja") is None:
        return False
    deepspeed()
    from torch.utils.cpp_extension import _get_build_directory

    builder = getattr(import_module("deepspeed.ops.op_builder"), builder_name)()
    lock = Path(_get_build_directory(builder.name, False), "lock")
    # Whoever finds a lock waits until it is gone, for ever if the process that held it was killed.
    with suppress(FileNotFoundError):
        if time.time() - lock.stat().st_mtime > STALE_S:
            lock.unlink()
    return bool(builder.is_compatible(verbose=False))
