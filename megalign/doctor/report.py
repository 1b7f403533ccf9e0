"""Shows findings as a table, as plain lines, or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from megalign.doctor.finding import Finding

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def show(findings: Sequence[Finding], job: dict[str, Any], *, as_json: bool) -> None:
    """Print findings on stdout. job: what was looked at, such as the number of ranks."""
    if as_json:
        held = {"ok": passed(findings), "job": job, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(held, indent=1), flush=True)
    elif sys.stdout.isatty():
        _print_table(findings, job)
    else:
        print("\n".join(lines(findings, job)), flush=True)


def passed(findings: Sequence[Finding]) -> bool:
    """Return whether no check failed."""
    return all(finding.state != "fail" for finding in findings)


def lines(findings: Sequence[Finding], job: dict[str, Any]) -> Iterator[str]:
    """Yield a line a finding, below it what to do, and a last line that counts them."""
    width = max((len(finding.check) for finding in findings), default=0)
    for finding in findings:
        yield f"{finding.state:<4}  {finding.check:<{width}}  {finding.found}"
        if finding.advice:
            yield f"{'':<4}  {'':<{width}}  -> {finding.advice}"
    yield _summary(findings, job)


def _summary(findings: Sequence[Finding], job: dict[str, Any]) -> str:
    counts = {state: sum(finding.state == state for finding in findings) for state in COLOURS}
    found = ", ".join(f"{count} {state}" for state, count in counts.items())
    looked = ", ".join(f"{job[name]} {name[: -1 if job[name] == 1 else None]}" for name in ("ranks", "hosts"))
    return f"doctor: {found} ({looked}, {job['seconds']:.0f} s)"


def _print_table(findings: Sequence[Finding], job: dict[str, Any]) -> None:
    # Imported here: only a terminal needs them.
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for heading in ("", "check", "found", "what to do"):
        table.add_column(heading)
    for finding in findings:
        state = f"[{COLOURS[finding.state]}]{finding.state}[/]"
        table.add_row(state, escape(finding.check), escape(finding.found), escape(finding.advice))
    console = Console()
    console.print(table)
    console.print(_summary(findings, job), highlight=False)
