"""Checks that the job's engine connects the ranks in the job's layout, as training would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megalign.doctor.finding import Finding, where
from megalign.doctor.needed import model_of
from megalign.doctor.visit import Check, Visit
from megalign.engines.build import engine_package
from megalign.runtime.ranks import lines_by_rank
from megalign.schema import UserError

NO_MODEL = "not run: the model, or the layout for it, is refused above"


def engine_checks() -> list[Check]:
    """Return the check that the engine makes the job's process groups and says how it would run the model."""
    return [Check("engine", _connected, _judge)]


def _connected(visit: Visit) -> list[Any]:
    """Return [how the engine would run, problem]; the other is empty."""
    cfg = visit.cfg
    if cfg is None:
        return ["", ""]
    package, model = engine_package(cfg), model_of(cfg)
    problem: str | None = f"{cfg.model.path} cannot be read here"
    if model is not None:
        try:
            package.check_weights(model)
            package.check(cfg, model)
            problem = package.layout_problem(cfg, model, visit.world.size, trained=True)
        except UserError as error:
            problem = str(error)
    if any(visit.share("whether the layout fits", problem)):  # another rank may not even reach the model
        return ["", NO_MODEL]
    assert model is not None
    return [package.describe(cfg, model, package.connect(cfg, visit.world), visit.world), ""]


def _judge(visit: Visit, answers: Sequence[Sequence[str]]) -> list[Finding]:
    if visit.cfg is None:
        return []
    findings = []
    for text, ranks in lines_by_rank([[answer[0] or answer[1]] for answer in answers]).items():
        shown = text if len(ranks) == len(answers) else f"{text} ({where(ranks, visit.hosts)})"
        findings.append(Finding("engine", "warn" if text == NO_MODEL else "ok", f"{visit.cfg.engine.name}: {shown}"))
    if len(findings) > 1:
        advice = "start all machines from one environment, on devices of one kind"
        return [Finding("engine", "fail", finding.found, advice) for finding in findings]
    return findings
