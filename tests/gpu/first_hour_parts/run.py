"""Runs one part of the first hour: `python -m tests.gpu.first_hour_parts.run MODULE:FUNCTION FOUND.json [--small]`."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.gpu.first_hour_parts.device import machine
from tests.gpu.first_hour_parts.report import Report, Skip

OURS = {"megalign", "tests", "benchmarks"}


def main(arguments: Sequence[str]) -> int:
    """Run the part; what it lacks makes it skipped, any other exception ends it with 1."""
    module, _, function = arguments[0].partition(":")
    report = Report(Path(arguments[1]), small="--small" in arguments)
    try:
        report.machine = machine()
        getattr(importlib.import_module(module), function)(report)
    except Skip as reason:
        report.skipped = str(reason)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in OURS:
            raise
        report.skipped = f"{error.name} is not installed"
    except Exception as error:
        traceback.print_exc()
        report.error = f"{type(error).__name__}: {error}"[:500]
        report.write()
        return 1
    report.done = True
    report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
