"""Measures memory and time of saving the Megatron engine on data ranks, against writing the same bytes plainly.

    python -m benchmarks.checkpoint [--quick] [--folder /scratch] [--rounds 5] [--ranks 1 2 4]

A random Llama in fp32 with AdamW's moments is saved into a run directory: at once, beside training
(`checkpoint.async`), and as Megatron-Core saves it (`fully_reshardable`). The limit is that each rank writes the values
it owns into a file, one tensor after the other, and syncs it. All take turns in one job, in rotating order; what they
wrote is removed before the next turn. The clock stops when all ranks are done. Memory is sampled from the kernel: the
peak of RssAnon (without mapped files) of a rank during a turn, above its value before, by the parameters of the model.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.logp_memory import resident_bytes
from megalign.config.layout import Layout
from megalign.convert import read_model_config
from megalign.engines.megatron.checkpoint import saved_parts
from megalign.engines.megatron.engine import AdamW, MegatronEngine
from megalign.engines.megatron.groups import make_groups
from megalign.engines.megatron.optimizer_state import begin_state, owned_state
from megalign.engines.megatron.parts import held_tensors
from megalign.engines.megatron.shard import EngineOptions
from megalign.files import sync, write_at
from megalign.runtime.distributed import World, process_group
from megalign.runtime.quiet import quiet_libraries
from megalign.train.checkpoint import Target, begin, finish, save_checkpoint
from megalign.train.checkpoint_facts import Facts
from tests.support.megatron_saves import megatron_save
from tests.support.processes import run_ranks
from tests.support.tiny_jobs import write_model

SIZES = {"vocab_size": 16000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
QUICK = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
PLAIN, AT_ONCE, BESIDE, WAITED = "plain write and sync", "at once", "beside training", "beside training: waited"
MEGATRON = "Megatron-Core's own"
FACTS = Facts("megatron", "torch.float32", optimizer=True, job={"data": {}})
MOST_TIME = 1.3  # x the plain write
MOST_BYTES = 16  # a parameter / data ranks, plus a buffer
BUFFER = 1 << 27
SAMPLE_S = 0.002


def engine_of(config: Path, world: World) -> MegatronEngine:
    """Build a trained-looking engine whose ranks are all data ranks."""
    groups = make_groups(Layout(), timeout_s=600)
    options = EngineOptions(dtype=torch.float32, device=world.device)
    engine = MegatronEngine(read_model_config(config), groups, options, adamw=AdamW())
    engine.shard.source = config
    torch.manual_seed(world.rank)
    with torch.no_grad():
        for parameter in engine.shard.named_parameters().values():
            parameter.fill_(0.5)
        engine.optimizer.reload_model_params()
        begin_state(engine.optimizer, 1.0)
        for owned in owned_state(engine.optimizer):
            for values in owned.tensors.values():
                values.uniform_()
    return engine


def write_plainly(engine: MegatronEngine, folder: Path) -> None:
    """Write the values that this rank owns, and nothing else."""
    handle, offset = os.open(folder / f"{dist.get_rank()}", os.O_WRONLY | os.O_CREAT), 0
    for part in saved_parts(held_tensors(engine.shard)[0], engine.shard, engine.optimizer):
        content = part.values.view(torch.uint8).numpy().data
        write_at(handle, content, offset)
        offset += len(content)
    sync(handle)
    os.close(handle)


def target_in(folder: Path) -> Target:
    """Describe the only checkpoint of a run."""
    return Target(folder, 1, FACTS, keep=1, keep_every=0, spare=None, feed={})


def save_at_once(engine: MegatronEngine, folder: Path) -> None:
    """Save as a job does."""
    save_checkpoint(engine, target_in(folder), {"step": 1})


def save_beside(engine: MegatronEngine, folder: Path, waited: list[float]) -> None:
    """Save as a job with `checkpoint.async` does, with nothing to train meanwhile; notes what it would wait for."""
    began = time.perf_counter()
    target = target_in(folder)
    saving = begin(engine, target, {"step": 1}, copied=True)
    waited.append(time.perf_counter() - began)
    written: list[Any] = []
    thread = threading.Thread(target=lambda: written.append(saving.write()))
    thread.start()
    thread.join()
    finish(target, saving, written.pop)


@contextmanager
def watched() -> Iterator[Callable[[], int]]:
    """Sample this process's memory inside the block; the yielded function returns its peak growth in bytes."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)  # else memory that an earlier turn has freed would hide what this one takes
    before = peak = resident_bytes("RssAnon") or 0
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.is_set():
            peak = max(peak, resident_bytes("RssAnon") or 0)
            stop.wait(SAMPLE_S)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: peak - before
    finally:
        stop.set()
        thread.join()


def measure(config: Path, scratch: Path, rounds: int, out: Path) -> None:
    """Let all ways take turns; rank 0 stores (seconds, bytes a rank) of each turn."""
    warnings.simplefilter("ignore")
    with process_group(timeout_s=600) as world:
        engine = engine_of(config, world)
        waited: list[float] = []
        ways: dict[str, Callable[[Path], None]] = {
            PLAIN: partial(write_plainly, engine),
            AT_ONCE: partial(save_at_once, engine),
            BESIDE: lambda folder: save_beside(engine, folder, waited),
            MEGATRON: lambda folder: megatron_save(engine, folder, {}),
        }
        found: dict[str, list[tuple[float, int]]] = {way: [] for way in [*ways, WAITED]}
        order = list(ways)
        for number in range(rounds + 1):  # the first round warms up
            for way in order[number % len(order) :] + order[: number % len(order)]:
                turn = one_turn(ways[way], scratch / "turn", world)
                if number:
                    found[way].append(turn)
        found[WAITED] = [(seconds, 0) for seconds in waited[1:]]
        count = sum(parameter.numel() for parameter in engine.shard.named_parameters().values())
        if world.is_main:
            torch.save({"parameters": count, "turns": found}, out)


def one_turn(save: Callable[[Path], None], folder: Path, world: World) -> tuple[float, int]:
    """Return the seconds until all ranks are done, and the most memory that one has needed."""
    if world.is_main:
        folder.mkdir()
        os.sync()
    dist.barrier()
    with watched() as growth:
        began = time.perf_counter()
        save(folder)
        dist.barrier()
        seconds = time.perf_counter() - began
    most = torch.tensor(growth())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    if world.is_main:
        shutil.rmtree(folder)
    dist.barrier()
    return seconds, int(most)


def report(found: dict[int, dict[str, Any]]) -> int:
    """Print the table; return 0 where the goals are met."""
    table = Table("data ranks", "way", "s, median", "x plain", "bytes a parameter and rank")
    missed = 0
    for ranks, result in found.items():
        turns, count = result["turns"], result["parameters"]
        plain = [seconds for seconds, _ in turns[PLAIN]]
        for way, each in turns.items():
            seconds = statistics.median(one for one, _ in each)
            ratio = statistics.median(one / base for (one, _), base in zip(each, plain, strict=True))
            most = max(size for _, size in each)
            memory = "" if way == WAITED else f"{most / count:.2f}"
            table.add_row(str(ranks), way, f"{seconds:.2f}", f"{ratio:.2f}", memory)
            missed += way == AT_ONCE and (ratio > MOST_TIME or most > BUFFER)
            missed += way == BESIDE and most > MOST_BYTES * count / ranks + BUFFER
    Console(width=110).print(table)
    size = next(iter(found.values()))["parameters"]
    print(f"{size / 1e6:.0f} million parameters; goals: at once <= {MOST_TIME} x plain with a buffer alone, beside")
    print(f"training <= {MOST_BYTES} bytes / data ranks and a buffer: {'missed' if missed else 'met'}")
    return int(missed > 0)


def main(arguments: Sequence[str]) -> int:
    """Measure each number of ranks in a launch of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a model of 25 million parameters")
    parser.add_argument("--folder", type=Path, default=None, help="where files are written (a temporary directory)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args(arguments)
    quiet_libraries()
    found = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        scratch = Path(name)
        sizes: dict[str, Any] = QUICK if args.quick else SIZES
        config = write_model(scratch / "model", **sizes)
        for ranks in args.ranks:
            out = scratch / f"{ranks}.pt"
            run_ranks(measure, ranks, config, scratch, args.rounds, out)
            found[ranks] = torch.load(out)
    return report(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
