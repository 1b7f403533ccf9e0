"""Checks a machine with a GPU in one hour: what must hold, what was found, and a verdict on each part.

    python -m tests.gpu.first_hour [--out FILE.json] [--only NAME ...] [--minutes 10] [--small]

Run it in the repository's folder; it needs no network. Each part has a process of its own and a time limit, so one
that crashes or hangs ends alone; what a part found until then is kept. The exit code is 0 where every verdict is as
expected or skipped, 1 otherwise, 2 for bad arguments or where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.gpu.first_hour_parts.report import EXPECTED, FAILED, SKIPPED

ROOT = Path(__file__).resolve().parents[2]
MOST_MINUTES = 10.0
CHILD = (sys.executable, "-m", "tests.gpu.first_hour_parts.run")
LOG_LINES = 40
CRASHED, TIMED_OUT = "crashed", "out of time"
COLORS = {EXPECTED: "green", SKIPPED: "yellow"}


@dataclass(frozen=True)
class Part:
    """Names a part, the function that checks it (module:function) and what must hold."""

    name: str
    function: str
    expected: str


HERE = "tests.gpu.first_hour_parts"
PARTS = (
    Part("probe.products", f"{HERE}.probes:products", "bf16 products add to an fp32 sum in place; fp32 is not TF32"),
    Part("probe.attention", f"{HERE}.attention:attention", "flash kernels equal float64; heads of keys not repeated"),
    Part("probe.sums", f"{HERE}.probes:sums", "atomics in bf16 differ from call to call, sums of experts do not"),
    Part("probe.deterministic", f"{HERE}.probes:deterministic", "float cumsum is refused, sampling works"),
    Part("probe.memory", f"{HERE}.attention:memory", "fp32 attention holds no whole scores"),
    Part("probe.copies", f"{HERE}.probes:copies", "copies to the device do not wait for it"),
    Part("tests", f"{HERE}.suite:tests", "pytest -m gpu passes"),
    Part("experts", f"{HERE}.steps:experts", "two passes of bf16 experts, four a token, have the same bits"),
    Part("job", f"{HERE}.job:job", "SFT, resume, rounds, export of a 0.5B; at most 2 host waits a micro-batch"),
    Part("head", f"{HERE}.head:head", "forms agree; times within their share of three products"),
    Part("profile", f"{HERE}.profiled:profile", "a step is not slower than transformers' on padded rows; GPU not idle"),
    Part("trl", f"{HERE}.profiled:beside_trl", "a step is not slower than TRL's"),
)


def read(path: Path) -> dict[str, Any]:
    """Return what a part wrote so far; it may have ended before it wrote anything."""
    nothing = {"machine": None, "skipped": None, "error": None, "done": False}
    empty: dict[str, Any] = {"checks": [], "figures": {}, **nothing}
    return {**empty, **json.loads(path.read_text(encoding="utf-8"))} if path.exists() else empty


def verdict(found: dict[str, Any], code: int | None) -> tuple[str, str]:
    """Return (verdict, reason) of a part that ended with an exit code, or was ended: None."""
    wrong = [check for check in found["checks"] if check["verdict"] == FAILED]
    missing = [check for check in found["checks"] if check["verdict"] == SKIPPED]
    first = f"; before that not as expected: {wrong[0]['name']}" if wrong else ""
    if code is None:
        return TIMED_OUT, f"ended after {len(found['checks'])} checks{first}"
    if not found["done"]:
        end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return CRASHED, (found["error"] or f"ended by {end}") + first
    if wrong:
        return FAILED, f"{wrong[0]['name']}: expected {wrong[0]['expected']}, found {wrong[0]['found']}"
    if found["skipped"] or (missing and len(missing) == len(found["checks"])):
        return SKIPPED, found["skipped"] or missing[0]["found"]
    return EXPECTED, f"{len(missing)} of {len(found['checks'])} checks skipped" if missing else ""


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a part and every process that it started, all of one session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_part(part: Part, child: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Run a part in a process of its own; return what it found, with its verdict."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="first_hour_") as folder:
        path, log = Path(folder, "found.json"), Path(folder, "log.txt")
        command = [*child, part.function, str(path), *(["--small"] if options.small else [])]
        with open(log, "wb") as file:
            environment = {**os.environ, "TMPDIR": folder}  # what a part that is ended leaves goes with the folder
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
            try:
                code = process.wait(timeout=60 * options.minutes)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end_group(process)
        found = read(path)
        name, reason = verdict(found, code)
        if name not in (EXPECTED, SKIPPED):
            found["log"] = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    head = {"name": part.name, "expected": part.expected, "verdict": name, "reason": reason}
    return {**head, "seconds": round(time.monotonic() - start, 1), **found}


def show(results: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the verdicts, then the checks and figures of each part."""
    table = Table(title="verdicts", title_justify="left")
    for column in ("part", "expected", "verdict", "seconds", "reason"):
        table.add_column(column, overflow="fold", no_wrap=column == "part")
    for each in results:
        color = COLORS.get(each["verdict"], "red")
        told = (escape(each["expected"]), f"[{color}]{each['verdict']}[/]", f"{each['seconds']:.0f}")
        table.add_row(each["name"], *told, escape(str(each["reason"])[:300]))
    console.print(table)
    detail = Table(title="found", title_justify="left")
    for column in ("part", "what", "expected", "found", "verdict"):
        detail.add_column(column, overflow="fold")
    for each in results:
        for check in each["checks"]:
            words = [escape(str(check[key])[:300]) for key in ("name", "expected", "found", "verdict")]
            detail.add_row(each["name"], *words)
        for name, value in each["figures"].items():
            detail.add_row(each["name"], escape(name), "", escape(str(value)), "")
        detail.add_section()
    console.print(detail)


def parse(arguments: Sequence[str], names: Sequence[str]) -> argparse.Namespace:
    """Read the command line; exits with 2 and one line where it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.first_hour", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all that was found, after every part")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(names)}; probe: all that begin so")
    parser.add_argument("--minutes", type=float, default=MOST_MINUTES, help="time limit of each part, at most 10")
    parser.add_argument("--small", action="store_true", help="tiny sizes: a quick look at the code paths")
    options = parser.parse_args(arguments)
    for name in options.only or ():
        if name not in names and not any(each.startswith(f"{name}.") for each in names):
            parser.error(f"--only is {name!r}; must be one of {', '.join(names)}, or probe")
    if not 0 < options.minutes <= MOST_MINUTES:
        parser.error(f"--minutes is {options.minutes:g}; must be above 0 and at most {MOST_MINUTES:g}")
    if options.out is not None and (options.out.is_dir() or not options.out.resolve().parent.is_dir()):
        parser.error(f"--out is {str(options.out)!r}; must be a file in a folder that exists")
    return options


def stop(*_: object) -> None:
    """Let a signal end the part that runs, and then this process."""
    raise KeyboardInterrupt


def main(arguments: Sequence[str], *, parts: Sequence[Part] = PARTS, child: Sequence[str] = CHILD) -> int:
    """Run the parts in order and return the exit code; `child` begins the command of a part."""
    options = parse(arguments, [part.name for part in parts])
    if not torch.cuda.is_available():
        print("tests.gpu.first_hour: torch finds no CUDA device here (torch.cuda.is_available())", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, stop)
    wanted = options.only or [part.name for part in parts]
    chosen = [part for part in parts if any(part.name == name or part.name.startswith(f"{name}.") for name in wanted)]
    console = Console(width=None if sys.stdout.isatty() else 160)
    written: dict[str, Any] = {"machine": None, "small": options.small, "parts": []}
    for part in chosen:
        result = run_part(part, child, options)
        told = result.pop("machine")  # this process starts no CUDA, whose device may be for one process alone
        if told and not written["machine"]:
            written["machine"] = told
            console.print(str(told), highlight=False, markup=False)
        written["parts"].append(result)
        line = f"{part.name}: {result['verdict']} ({result['seconds']:.0f} s) {result['reason']}"
        console.print(line, highlight=False, markup=False)
        if options.out is not None:
            options.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    show(written["parts"], console)
    return 0 if all(each["verdict"] in (EXPECTED, SKIPPED) for each in written["parts"]) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
