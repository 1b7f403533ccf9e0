"""Finds the versions of what computes numbers in this process: packages, machine and megalign's own source."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path

import torch

import megalign

# Ranks with different ones compute different numbers, cut text into other tokens, or cannot talk to each other.
NUMERIC = ("torch", "CUDA", "NCCL", "megatron-core", "deepspeed", "transformers", "tokenizers", "peft",
           "transformer-engine", "flash-attn", "source of megalign", "machine")  # fmt: skip
OTHERS = ("Python", "numpy", "safetensors", "datasets", "pydantic", "mpi4py", "NVIDIA driver", "Linux", "C library")
ABSENT = "not installed"
DRIVER = Path("/proc/driver/nvidia/version")


def versions() -> dict[str, str]:
    """Return {name: version} of this process, its packages, its machine and megalign's own source."""
    found = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "Linux": platform.release(),
        "C library": " ".join(platform.libc_ver()),
        "machine": platform.machine(),
        "CUDA": torch.version.cuda or ABSENT,
        "NCCL": _nccl(),
        "NVIDIA driver": driver_of(DRIVER.read_text()) if DRIVER.is_file() else ABSENT,
        "source of megalign": source_hash(),
    }
    for name in (*NUMERIC, *OTHERS):
        if name not in found:
            found[name] = installed(name) or ABSENT
    return found


def driver_of(text: str) -> str:
    """Return the version in what the driver says of itself."""
    return next((word for word in text.split() if word[0].isdigit() and "." in word), "unknown")


def _nccl() -> str:
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else ABSENT  # type: ignore[no-untyped-call]


def installed(name: str) -> str | None:
    """Return the version of an installed distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_hash(package: Path = Path(megalign.__file__).parent) -> str:
    """Return the first 12 hexadecimal digits of a hash over all Python files of a package."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
