"""Compares loss and gradient norm of every loss in every layout with float64 Hugging Face models on one process.

    python -m benchmarks.parity [--layouts one,tp2,...] [--losses sft,...] [--json table.json]

The layouts, models and answers are those of tests/engines, where a quick part of this is run. Each layout holds a dense
model of five layers with tied weights and one with experts (auxiliary loss on) as far as it can, and takes a step of
each loss with each kind of recomputation, packed and padded, in micro-batches that are smaller than some groups. fp32.
Errors are relative; exits 1 above 1e-5 for a loss or 1e-4 for a gradient norm.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from megalign.runtime.distributed import process_group, spawn
from megalign.runtime.quiet import quiet_libraries
from tests.support.loss_cases import KINDS, LOSSES
from tests.support.parity_answers import Answers
from tests.support.parity_cases import SMALL, Case, write_checkpoints
from tests.support.parity_layouts import EXPERTS, LAYOUTS

RECOMPUTES = ("none", "selective", "full")
MOST_LOSS_ERROR, MOST_NORM_ERROR = 1e-5, 1e-4
Found = dict[str, tuple[float, float]]  # "model loss recompute packing" -> (loss, gradient norm)


def models_of(name: str) -> list[str]:
    """Return the models a layout is tested with: the dense one, and one of the models with experts in turn."""
    turn = EXPERTS[list(LAYOUTS).index(name) % len(EXPERTS)]
    return [model for model in ("deep", turn) if LAYOUTS[name].takes(model)]


def run_world(folder: Path, names: Sequence[str], losses: Sequence[str]) -> None:
    """Run every step of every named layout on one world size; rank 0 writes one result file for each layout."""
    quiet_libraries()
    with process_group(timeout_s=300) as world:
        from tests.support.parity_job import Job

        for name in names:
            job, results = Job(folder, name, LAYOUTS[name], world), {}
            for model in models_of(name):
                for recompute in RECOMPUTES:
                    engine = job.engine(model, recompute=recompute)
                    for loss in losses:
                        for packing in (True, False):
                            result = job.agreed(job.step(engine, Case(model, loss, SMALL, packing)))
                            assert result["same_on_all_ranks"]
                            key = f"{model} {loss} {recompute} {'packed' if packing else 'padded'}"
                            results[key] = (result["loss"], engine.update(0.0))
            if world.is_main:
                torch.save(results, folder / "results.partial")
                (folder / "results.partial").rename(folder / f"{name}.pt")


def errors(answers: Answers, results: Found) -> dict[str, dict[str, Any]]:
    """Return, for each kind of model, the number of steps, the largest errors and where they occurred."""
    kinds: dict[str, dict[str, Any]] = {}
    for key, (loss, norm) in results.items():
        model, name, *way = key.split()
        answer = answers.step(model, name)
        row = kinds.setdefault(
            "dense" if model == "deep" else model, {"steps": 0, "loss": 0.0, "norm": 0.0, "loss at": "", "norm at": ""}
        )
        row["steps"] += 1
        wrong = {"loss": abs(loss / answer["loss"] - 1), "norm": abs(norm / answer["grad_norm"] - 1)}
        for what, error in wrong.items():
            if not error <= row[what]:
                row[what], row[f"{what} at"] = error, " ".join([name, *way])
    return kinds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="comma-separated names, of: " + ", ".join(LAYOUTS))
    parser.add_argument("--losses", default=",".join(LOSSES), help="comma-separated names")
    parser.add_argument("--json", type=Path, help="write the table here too")
    args = parser.parse_args()
    quiet_libraries()
    names, losses, console, began = args.layouts.split(","), args.losses.split(","), Console(), time.perf_counter()
    table = Table("layout", "ranks", "model", "steps", "loss error", "worst in", "norm error", "worst in")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, Progress(console=console) as progress:
        task = progress.add_task("layouts", total=len(names))
        answers = Answers(Path(temporary))
        for model in ("deep", *EXPERTS):
            write_checkpoints(answers.folder, model)
            answers.score_known(model, list(KINDS))
        torch.save(answers.known, answers.folder / "known.pt")
        for size in sorted({LAYOUTS[name].num_processes for name in names}):
            together = [name for name in names if LAYOUTS[name].num_processes == size]
            spawn(run_world, size, answers.folder, together, losses)
            for name in together:
                for model, row in errors(answers, torch.load(answers.folder / f"{name}.pt")).items():
                    rows.append({"layout": name, "ranks": size, "model": model, **row})
                progress.advance(task)
    for row in rows:
        table.add_row(
            row["layout"], str(row["ranks"]), row["model"], str(row["steps"]),
            f"{row['loss']:.1e}", row["loss at"], f"{row['norm']:.1e}", row["norm at"],
        )  # fmt: skip
    console.print(table)
    failed = [row for row in rows if not (row["loss"] <= MOST_LOSS_ERROR and row["norm"] <= MOST_NORM_ERROR)]
    steps, minutes = sum(row["steps"] for row in rows), (time.perf_counter() - began) / 60
    console.print(f"{steps} steps in {len(names)} layouts, {len(failed)} rows above the limits, {minutes:.0f} minutes")
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(bool(failed) or not rows)


if __name__ == "__main__":
    sys.exit(main())
