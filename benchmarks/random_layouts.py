"""Compares random steps in random layouts with float64 Hugging Face models on one process.

    python -m benchmarks.random_layouts [--cases 100] [--seed 0] [--only 17]

Each case is a layout of 1, 2 or 4 ranks that works for a drawn model (family, depth, heads, vocabulary, experts), a
loss, ragged groups, micro-batch tokens, packing, recomputation and the head's chunks; tests/engines takes ten of them.
Prints each failure with its case; exits 1 if there are any. fp32, errors above 1e-5 (loss) and 1e-4 (gradient norm).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from megalign.runtime.distributed import spawn
from megalign.runtime.quiet import quiet_libraries
from tests.support.random_cases import RandomCase, draw_cases, failure, run_world, write_case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case to run")
    args = parser.parse_args()
    quiet_libraries()
    console, began = Console(), time.perf_counter()
    drawn = list(enumerate(draw_cases(args.cases, number=args.seed)))
    cases = [(number, case) for number, case in drawn if args.only in (None, number)]
    with tempfile.TemporaryDirectory() as temporary, Progress(console=console) as progress:
        folder = Path(temporary)
        answers = {}
        for number, case in progress.track(cases, description="answers"):
            (folder / str(number)).mkdir()
            answers[number] = write_case(case, folder / str(number))
        task = progress.add_task("steps", total=len(cases))
        failures = []
        for ranks in (1, 2, 4):
            mine = [(number, case) for number, case in cases if case.ranks == ranks]
            if mine:
                spawn(run_world, ranks, folder, mine)
            for number, case in mine:
                result = json.loads((folder / str(number) / "found.json").read_text())
                problem = failure(result, answers[number])
                failures += [f"case {number}: {problem}\n  {case}"] if problem else []
                progress.advance(task)
    for line in failures:
        console.print(line, style="red", markup=False)
    console.print(summary([case for _, case in cases]))
    minutes = (time.perf_counter() - began) / 60
    console.print(f"{len(cases)} cases of seed {args.seed}, {len(failures)} failures, {minutes:.0f} minutes")
    return int(bool(failures))


def summary(cases: list[RandomCase]) -> str:
    """Return how often each layout axis, family and loss was drawn."""
    layouts = [case.layout for case in cases]
    axes = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "sequence")
    counts = Counter({axis: sum(getattr(layout, axis) > 1 for layout in layouts) for axis in axes})
    counts["sequence"] = sum(layout.sequence for layout in layouts)
    families = Counter(case.model["model_type"] for case in cases)
    losses = Counter(case.loss for case in cases)
    return "\n".join(
        ", ".join(f"{name} {count}" for name, count in counter.items()) for counter in (counts, families, losses)
    )


if __name__ == "__main__":
    sys.exit(main())
