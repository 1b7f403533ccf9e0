"""Runs the tests that need a GPU inside this process."""

from __future__ import annotations

import collections
from typing import Any

from tests.gpu.first_hour_parts.report import Report

SMALL = "test_scores_and_gradients and torch"


class Outcomes:
    """Collects outcomes of tests as a plugin of pytest."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.counts: collections.Counter[str] = collections.Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note a test that failed or was skipped at once, and count those that passed."""
        name = report.nodeid.removeprefix("tests/gpu/")
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = str(report.longrepr) if crash is None else crash.message
            self.report.check(name, False, expected="passes", found=why.strip()[:500])
        elif report.skipped:
            self.report.skip(name, str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr))
        elif report.when == "call":
            self.counts["passed"] += 1


def tests(report: Report) -> None:
    """Run `pytest -m gpu tests/gpu`; small: one file's."""
    import pytest

    outcomes = Outcomes(report)
    chosen = ["-k", SMALL] if report.small else []
    code = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", *chosen, "tests/gpu"], plugins=[outcomes])
    passed = outcomes.counts["passed"]
    report.check("exit code of pytest", code == 0, expected="0", found=int(code))
    report.check("tests that passed", passed > 0, expected="some", found=passed)
