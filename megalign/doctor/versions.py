"""Checks that all ranks run the same versions of what computes numbers, and versions that megalign works with."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

from packaging.requirements import Requirement

import megalign
from megalign.config.job import JobConfig
from megalign.doctor.finding import Finding, State, listed, where
from megalign.doctor.visit import Check, Visit
from megalign.runtime.ranks import lines_by_rank
from megalign.runtime.versions import ABSENT, NUMERIC, OTHERS, installed, versions

SHOWN = ("Python", "torch", "CUDA", "megatron-core", "deepspeed", "transformers")


def version_checks() -> list[Check]:
    """Return the check of versions on every rank, and of those that megalign's own requirements name."""
    return [
        Check("versions", lambda visit: versions(), judge_versions),
        Check("requirements", lambda visit: unmet(visit.cfg), _judge_requirements),
    ]


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
    found = installed(requirement.name)
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
