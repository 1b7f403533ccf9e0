"""Measures time and memory of the log-prob head, forward and backward, against the three matrix products it needs.

    python -m benchmarks.logp [--quick] [--only NAME ...] [--rounds N]

Each case runs in one single-threaded process per tensor-parallel rank. Contestants take turns, because a machine's
speed drifts, after a warm-up round that does not count. With one rank, time is the thread's CPU time, which equals wall
time on an idle machine and ignores other processes. With two ranks it is the slower rank's wall time, because CPU time
would miss waiting and gloo's threads: keep the machine idle. Ratios are to the products in the same round. The products
write into preallocated memory, which makes them a harder limit.

Extra memory is the peak of torch's allocator (from its profiler's record of every allocation and free) without inputs,
dH and dW, on the rank where it is largest. Vectors of length T count. Memory that libraries allocate themselves
(scratch of oneDNN and MKL) does not; the growth of resident memory includes it, and dH and dW where they are newly
allocated. Ours adds dW to an existing fp32 `main_grad`; the others create `.grad`.

With bfloat16 inputs ours has two rows: gradient products in fp32, the default on a CPU, or in bfloat16, as on a GPU.
Logits are fp32 in ours and rounded to bfloat16 in the others, so their losses differ; "dH off" is the relative distance
to the fp32 result for the same inputs. A case names tokens x hidden x vocabulary. (e) needs the package
`cut-cross-entropy`, and it and the fused (c) need g++ for torch.compile.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.logp_memory import watch
from benchmarks.logp_rivals import LIMIT, OTHERS, Inputs, Way, ways
from megalign.config.layout import Layout
from megalign.engines.megatron.groups import Groups, make_groups
from megalign.ops.linear_logp import linear_logp
from megalign.ops.vocab import VocabShard, tile_rows
from megalign.runtime import cpu_shims
from megalign.runtime.distributed import process_group, spawn
from megalign.runtime.quiet import quiet_libraries

TIMEOUT_S = 1800
MB = 1e6
# In nats per token: detects a wrong loss, allows rounding (the others round logits of about 4 to bfloat16: 8e-3 each).
LOSS_WITHIN = {"float32": 1e-4, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Case:
    """Describes one case: shape, dtype, ranks and rounds."""

    name: str
    num_tokens: int
    hidden: int
    vocabulary: int
    dtype: str
    ranks: int = 1
    rounds: int = 3

    @property
    def logits_bytes(self) -> int:
        """Return the size of one rank's logits in fp32."""
        return 4 * self.num_tokens * self.vocabulary // self.ranks


CASES = (
    Case("small-fp32", 2048, 512, 32000, "float32", rounds=5),
    Case("small-bf16", 2048, 512, 32000, "bfloat16", rounds=5),
    Case("152k-fp32", 1024, 2048, 152064, "float32"),
    Case("152k-bf16", 1024, 2048, 152064, "bfloat16"),
    Case("152k-fp32-tp2", 1024, 2048, 152064, "float32", ranks=2),
    Case("152k-bf16-tp2", 1024, 2048, 152064, "bfloat16", ranks=2),
    Case("128k-fp32", 4096, 2048, 128256, "float32", rounds=1),
    # Only to measure how memory grows with the tokens, against small-fp32 and small-bf16.
    Case("long-fp32", 8192, 512, 32000, "float32", rounds=1),
    Case("long-bf16", 8192, 512, 32000, "bfloat16", rounds=1),
)
QUICK = ("small-fp32", "small-bf16")
GROWTH = {"small-fp32": "long-fp32", "small-bf16": "long-bf16"}


@dataclass(frozen=True)
class Row:
    """Holds one contestant's measurements in one case."""

    name: str
    skipped: str = ""
    seconds: tuple[float, ...] = ()
    extra: int = 0
    resident: int | None = None
    loss: float = 0.0
    hidden_off: float = 0.0  # |dH - exact dH| / |exact dH|

    def ratios(self, limit: Row) -> list[float]:
        return [mine / least for mine, least in zip(self.seconds, limit.seconds, strict=True)]


def make_inputs(case: Case, groups: Groups) -> Inputs:
    """Draw inputs: logits of unit variance, random targets, coefficients of both signs."""
    rows = case.vocabulary // case.ranks
    shard = VocabShard(groups.tensor_rank * rows, rows, case.vocabulary, groups.tensor)
    dtype = getattr(torch, case.dtype)
    same, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + groups.tensor_rank)
    hidden_TH = torch.randn(case.num_tokens, case.hidden, generator=same).to(dtype).requires_grad_()
    weight_VH = torch.randn(rows, case.hidden, generator=own).mul_(case.hidden**-0.5).to(dtype).requires_grad_()
    target_T = torch.randint(case.vocabulary, (case.num_tokens,), generator=same)
    coefficient_T = torch.randn(case.num_tokens, generator=same)
    exact_TH = hidden_TH.detach().float().requires_grad_()
    exact = linear_logp(exact_TH, weight_VH.detach().float(), target_T, shard)
    (exact.logp_N * coefficient_T).sum().backward()
    assert exact_TH.grad is not None
    weight_VH.main_grad = torch.zeros(weight_VH.shape)  # type: ignore[attr-defined]
    return Inputs(hidden_TH, weight_VH, target_T, coefficient_T, exact.lse_N.detach(), exact_TH.grad, shard, groups)


def run_once(way: Way, inputs: Inputs) -> tuple[float, Tensor]:
    """Run one contestant once; return (seconds, loss)."""
    forget_grads(inputs)
    alone = inputs.groups.tensor_size == 1
    clock = time.thread_time if alone else time.perf_counter
    if not alone:
        dist.barrier()
    start = clock()
    loss = way(inputs)
    return clock() - start, loss


def forget_grads(inputs: Inputs) -> None:
    inputs.hidden_TH.grad = inputs.weight_VH.grad = None


def results(inputs: Inputs) -> list[Tensor]:
    return [grad for grad in (inputs.hidden_TH.grad, inputs.weight_VH.grad) if grad is not None]


def slowest(number: float) -> float:
    """Return the largest of all ranks' numbers."""
    number_1 = torch.tensor([number], dtype=torch.float64)
    dist.all_reduce(number_1, op=dist.ReduceOp.MAX)
    return number_1.item()


def measure(case: Case, folder: str) -> None:
    """Run one rank of a case; rank 0 writes the rows to `folder`."""
    quiet_libraries()
    torch._inductor.config.compile_threads = 1  # its worker processes would disturb the timing
    torch.set_num_threads(1)
    cpu_shims.install()
    with process_group(timeout_s=TIMEOUT_S) as world:
        inputs = make_inputs(case, make_groups(Layout(tensor=case.ranks), timeout_s=TIMEOUT_S))
        contestants = ways(inputs)
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        seen: dict[str, Row] = {}
        for round_number in range(case.rounds + 1):
            for name, way in contestants.items():
                if isinstance(way, str):
                    continue
                if round_number == 1:  # compilation happened in round 0; watching costs microseconds
                    took, seen[name] = run_watched(name, way, inputs)
                else:
                    took, _ = run_once(way, inputs)
                if round_number:
                    seconds[name].append(slowest(took))
        rows = [
            Row(name, skipped=way) if isinstance(way, str) else replace(seen[name], seconds=tuple(seconds[name]))
            for name, way in contestants.items()
        ]
        if world.is_main:
            (Path(folder) / "rows.json").write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


def run_watched(name: str, way: Way, inputs: Inputs) -> tuple[float, Row]:
    """Run one contestant once while recording memory; return (seconds, its row without times)."""
    forget_grads(inputs)
    (took, loss), peak = watch(partial(run_once, way, inputs), partial(results, inputs))
    off = 0.0
    if inputs.hidden_TH.grad is not None:
        grad_TH = inputs.hidden_TH.grad.float()
        true_TH = inputs.true_grad_TH.float()
        off = ((grad_TH - true_TH).norm() / true_TH.norm()).item()
    resident = None if peak.resident is None else int(slowest(peak.resident))
    return took, Row(name, "", (), int(slowest(peak.extra)), resident, loss.item(), off)


def run_case(case: Case) -> list[Row]:
    """Run all contestants of a case in fresh processes and return their rows."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, case.ranks, case, folder)
        return [Row(**row) for row in json.loads((Path(folder) / "rows.json").read_text(encoding="utf-8"))]


def check_losses(case: Case, rows: Sequence[Row]) -> None:
    """Raise AssertionError where contestants do not compute the same loss."""
    reference = next(row for row in rows if row.name.startswith("ours, recompute"))
    for row in rows:
        if row.name != LIMIT and not row.skipped:
            # Relative to the number of terms, because coefficients of both signs make the sum itself small.
            off = abs(row.loss - reference.loss) / case.num_tokens
            assert off < LOSS_WITHIN[case.dtype], f"{case.name}: {row.name} gives {row.loss}, not {reference.loss}"


def add_rows(table: Table, case: Case, rows: Sequence[Row]) -> None:
    """Add the rows of a case to the table, as a section."""
    limit = rows[0]
    shape = f"{case.num_tokens} x {case.hidden} x {case.vocabulary}"
    inputs = f"{case.dtype}, {case.ranks} rank{'s' if case.ranks > 1 else ''}"
    for index, row in enumerate(rows):
        case_text = {0: case.name, 1: shape, 2: inputs}.get(index, "")
        if row.skipped:
            table.add_row(case_text, row.name, row.skipped)
            continue
        ratios = row.ratios(limit)
        is_limit = row.name == LIMIT
        table.add_row(
            case_text,
            row.name,
            f"{statistics.median(row.seconds):.2f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} - {max(ratios):.2f}",
            "" if is_limit else f"{row.extra / MB:.0f}",
            "" if is_limit else f"{row.extra / case.logits_bytes:.3f}",
            "" if row.resident is None or is_limit else f"{row.resident / MB:.0f}",
            "" if is_limit else f"{row.loss:.3f}",
            "" if is_limit else f"{row.hidden_off:.0e}",
        )
    table.add_section()


def verdicts(measured: dict[str, tuple[Case, list[Row]]]) -> list[tuple[bool, str]]:
    """Return (whether it holds, description with numbers) of each target that the measured cases decide."""
    lines: list[tuple[bool, str]] = []
    for case, rows in measured.values():
        speed = {row.name: statistics.median(row.ratios(rows[0])) for row in rows if not row.skipped}
        others = {name: ratio for name, ratio in speed.items() if name.startswith(OTHERS)}
        chunks = next(ratio for name, ratio in others.items() if name.startswith("(d)"))
        best = min(others, key=lambda name: others[name])
        for row in rows:
            head = f"{case.name}: {row.name}"
            given, again = "given lse" in row.name, "recompute" in row.name and row.name.startswith("ours")
            if (given or again) and case.ranks == 1 and case.name not in GROWTH.values():
                bound = 1.10 if given else 1.45
                lines.append((speed[row.name] <= bound, f"{head} {speed[row.name]:.2f} <= {bound:.2f} x the products"))
            if given:
                line = f"{head} {speed[row.name]:.2f}, not slower than {best} {others[best]:.2f}"
                lines.append((speed[row.name] <= others[best], line))
            if again:
                line = f"{head} {speed[row.name]:.2f}, not slower than (d) {chunks:.2f}"
                lines.append((speed[row.name] <= chunks, line))
            if row.name.startswith("ours") and case.num_tokens == 4096:
                share = row.extra / case.logits_bytes
                lines.append((share <= 1 / 16, f"{head} extra memory {share:.4f} <= 1/16 of the logits"))
        if GROWTH.get(case.name) in measured:
            longer, long_rows = measured[GROWTH[case.name]]
            # Vectors of length T: two statistics per tile and, during the merge, per pair of tiles; ten others.
            num_tiles = -(-case.vocabulary // tile_rows(case.vocabulary))
            vectors = 4 * (3 * num_tiles + 10)
            for row, long_row in zip(rows, long_rows, strict=True):
                if row.name.startswith("ours"):
                    growth = (long_row.extra - row.extra) / (longer.num_tokens - case.num_tokens)
                    line = f"{case.name}: {row.name} extra memory grows by {growth:.0f} bytes a token, <= {vectors}"
                    lines.append((growth <= vectors, f"{line} (vectors)"))
    return lines


def new_table(title: str) -> Table:
    table = Table(title=title)
    columns = ("case", "", "seconds", "x products", "range", "extra MB", "of logits", "resident MB", "loss", "dH off")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right")
    return table


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [case.name for case in CASES]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help=", ".join(QUICK))
    parser.add_argument("--rounds", type=int, help="rounds that count (default 1 to 5)")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    chosen = options.only or (QUICK if options.quick else names)
    measured: dict[str, tuple[Case, list[Row]]] = {}
    for case in CASES:
        if case.name not in chosen:
            continue
        case = replace(case, rounds=options.rounds or case.rounds)
        rows = run_case(case)
        check_losses(case, rows)
        table = new_table(f"{case.name}; torch {torch.__version__}, {platform.machine()}, one thread a rank")
        add_rows(table, case, rows)
        console.print(table)
        measured[case.name] = (case, rows)
    for holds, line in verdicts(measured):
        console.print(f"{'holds ' if holds else 'MISSED'}  {line}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
