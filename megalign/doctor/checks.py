"""Lists the checks in the order in which they run."""

from __future__ import annotations

from megalign.doctor.devices import device_checks
from megalign.doctor.engine import engine_checks
from megalign.doctor.finding import Finding, where
from megalign.doctor.inputs import input_checks
from megalign.doctor.layout import layout_checks
from megalign.doctor.limits import limit_checks
from megalign.doctor.network import network_checks
from megalign.doctor.reach import reach_checks
from megalign.doctor.refusals import refusal_checks
from megalign.doctor.storage import storage_checks
from megalign.doctor.versions import version_checks
from megalign.doctor.visit import Check, Visit
from megalign.runtime.ranks import lines_by_rank


def first_checks(visit: Visit) -> list[Check]:
    """Return the checks that need no collective."""
    machines = [*reach_checks(), *version_checks(), *device_checks(), *limit_checks()]
    return [*machines, *layout_checks(), *input_checks(), *refusal_checks(), *storage_checks()]


def connected_checks(visit: Visit) -> list[Check]:
    """Return the checks of collectives, after the ranks have connected to each other."""
    return [*network_checks(visit), *engine_checks()]


def configuration_check(problem: str) -> Check:
    """Return the check that every rank has read the same configuration; problem: this rank's, or empty."""

    def judge(visit: Visit, problems: list[str]) -> list[Finding]:
        if visit.config_file is None:
            advice = "give the job's configuration to check its layout, storage and inputs too"
            return [Finding("configuration", "ok", "none given: only machines are checked", advice)]
        findings = [
            Finding(
                "configuration",
                "fail",
                f"{text} ({where(ranks, visit.hosts)})",
                "correct it: train would refuse it too",
            )
            for text, ranks in lines_by_rank([[text] if text else [] for text in problems]).items()
        ]
        return findings or [Finding("configuration", "ok", f"{visit.config_file} is valid")]

    return Check("configuration", lambda visit: problem, judge)
