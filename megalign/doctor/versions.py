"""Checks that all ranks run the same versions of what computes numbers, and versions that megalign works with."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from packaging.requirements import Requirement

import megalign
from megalign.config.job import JobConfig
from megalign.doctor.finding import Finding, State, lines_by_rank, listed, where
from megalign.doctor.visit import Check, Visit

# Ranks with different ones compute different numbers, cut text into other tokens, or cannot talk to each other.
NUMERIC = ("torch", "CUDA", "NCCL", "megatron-core", "deepspeed", "transformers", "tokenizers", "peft",
           "transformer-engine", "flash-attn", "source of megalign", "machine")  # fmt: skip
OTHERS = ("Python", "numpy", "safetensors", "datasets", "pydantic", "mpi4py", "NVIDIA driver", "Linux", "C library")
SHOWN = ("Python", "torch", "CUDA", "megatron-core", "deepspeed", "transformers")
ABSENT = "not installed"
DRIVER = Path("/proc/driver/nvidia/version")


def version_checks() -> list[Check]:
    """Return the check of versions on every rank, and of those that megalign's own requirements name."""
    return [
        Check("versions", lambda visit: versions(), judge_versions),
        Check("requirements", lambda visit: unmet(visit.cfg), _judge_requirements),
    ]


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
            found[name] = _installed(name) or ABSENT
    return found


def driver_of(text: str) -> str:
    """Return the version in what the driver says of itself."""
    return next((word for word in text.split() if word[0].isdigit() and "." in word), "unknown")


def _nccl() -> str:
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else ABSENT  # type: ignore[no-untyped-call]


def _installed(name: str) -> str | None:
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


def judge_versions(visit: Visit, answers: Sequence[dict[str, str]]) -> list[Finding]:
    """Return a finding for each name whose versions differ, or one that names the common ones."""
    findings = []
    for name in (*NUMERIC, *OTHERS):
        values = [answer[name] for answer in answers]
        if len(set(values)) > 1:
            state: State = "fail" if name in NUMERIC else "warn"
            why = "numbers would depend on the rank" if name in NUMERIC else "usually harmless"
            advice = f"start all machines from one environment or image; {why}"
            findings.append(Finding("versions", state, f"{name} differs: {listed(values, visit.hosts)}", advice))
    if findings:
        return findings
    shown = ", ".join(f"{name} {answers[0][name]}" for name in SHOWN if answers[0][name] != ABSENT)
    return [Finding("versions", "ok", f"{shown}, megalign {megalign.__version__} ({answers[0]['source of megalign']})")]


def unmet(cfg: JobConfig | None) -> list[str]:
    """Return a line for each requirement of megalign, or of an extra that the job uses, that is not met here."""
    try:
        texts = importlib.metadata.requires("megalign") or []
    except importlib.metadata.PackageNotFoundError:
        return []  # run from a source tree that was never installed
    extras = set() if cfg is None else _extras(cfg)
    return list(dict.fromkeys(filter(None, (_problem(Requirement(text), extras) for text in texts))))


def _extras(cfg: JobConfig) -> set[str]:
    """Return the extras of megalign that a job needs."""
    needed = {"deepspeed"} if cfg.engine.name == "deepspeed" else set()
    return needed | ({"wandb"} if "wandb" in cfg.trackers else set())


def _problem(requirement: Requirement, extras: set[str]) -> str:
    marker = requirement.marker
    if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
        return ""
    found = _installed(requirement.name)
    wanted = f"{requirement.name}{requirement.specifier}"
    if found is None:
        return f"{wanted} is {ABSENT}"
    return "" if requirement.specifier.contains(found, prereleases=True) else f"{wanted}: {found} is installed"


def _judge_requirements(visit: Visit, answers: Sequence[list[str]]) -> list[Finding]:
    findings = [
        Finding("requirements", "fail", f"{problem} ({where(ranks, visit.hosts)})", "install it there: pip install")
        for problem, ranks in lines_by_rank(answers).items()
    ]
    return findings or [Finding("requirements", "ok", "all packages are in the ranges that megalign is made for")]
