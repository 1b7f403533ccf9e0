"""Measures time and memory of conversions in both directions, against a plain file copy and against transformers.

    python -m benchmarks.convert [--quick] [--folder /scratch] [--rounds 6] [--workers 2]

A random Llama in bfloat16 (2.5 GB, its vocabulary not a multiple of what Megatron pads to) is converted to a Megatron
checkpoint and back. The limit is a copy of the same files, each synced to disk; `transformers` loads and saves the same
checkpoint; a bare stream reads and writes tensor by tensor without changing any layout. All run in one job, in rotating
order (the first of a round finds a different machine state), each in a fresh process that first imports everything and
reads its input once, so that it is in the page cache; outputs are synced to disk when the clock stops, and removed
before the next turn. Memory is sampled from the kernel: the peak of RssAnon (without mapped files) above its value
after the imports, and the peak of all resident memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors import safe_open

from benchmarks.logp_memory import resident_bytes
from megalign.convert import HFWriter, read_model_config
from megalign.convert.hf.reader import HFSource
from megalign.convert.hf.safetensors_file import SafetensorsFile
from megalign.convert.hf.writer import model_specs
from megalign.convert.transfer import ConversionOptions, hf_to_megatron, megatron_to_hf
from megalign.files import sync
from megalign.runtime.quiet import quiet_libraries

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128037,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
QUICK: dict[str, object] = {"vocab_size": 32037, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
SHARD_BYTES = 1_000_000_000
MOST_TIME, MOST_TENSORS, MOST_MORE = 1.3, 2, 500_000_000  # x the copy's time; x the largest tensor, plus bytes
SAMPLE_S = 0.002

HF, MEGATRON, BACK = "hf", "megatron", "out"
COPY, COPY_BACK, STREAM = "copy of the HF files", "copy of the Megatron files", "bare stream of tensors"
THERE, RETURN, PEER = "HF to Megatron", "Megatron to HF", "transformers load + save"
SOURCE_OF = {COPY: HF, COPY_BACK: MEGATRON, STREAM: HF, THERE: HF, RETURN: MEGATRON, PEER: HF}
LIMIT_OF = {STREAM: COPY, THERE: COPY, RETURN: COPY_BACK, PEER: COPY}


def make_checkpoint(folder: Path, fields: dict[str, object]) -> None:
    """Write a checkpoint of random weights, tensor by tensor."""
    config = folder.with_name("config")
    config.mkdir()
    (config / "config.json").write_text(json.dumps(MODEL | fields))
    random = torch.Generator().manual_seed(0)
    with HFWriter(folder, source=config, dtype=torch.bfloat16, max_shard_bytes=SHARD_BYTES) as writer:
        for name, spec in writer.specs.items():
            writer.add(name, torch.empty(spec.shape, dtype=spec.dtype).normal_(std=0.02, generator=random))


def copy(source: Path, out: Path) -> None:
    """Copy every file and sync it to disk."""
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        target = out / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        sync(target)


def stream(source: Path, out: Path) -> None:
    """Copy every tensor of every file to the same offset in a new file."""
    out.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        model = model_specs(read_model_config(source), torch.bfloat16)
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            target = SafetensorsFile(out / path.name, {name: model[name] for name in names})
            for name in names:
                target.write(name, file.get_tensor(name))
            target.close()


def load_and_save(source: Path, out: Path) -> None:
    """Load and save the checkpoint with transformers alone, and sync the files to disk."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model.save_pretrained(out, max_shard_size=SHARD_BYTES)
    for path in out.iterdir():
        sync(path)


def work(way: str, folder: Path, workers: int) -> Callable[[], None]:
    """Return the function that is timed for a contestant."""
    source, out = folder / SOURCE_OF[way], folder / BACK
    options = ConversionOptions(workers, SHARD_BYTES)
    return {
        COPY: partial(copy, source, out),
        COPY_BACK: partial(copy, source, out),
        STREAM: partial(stream, source, out),
        PEER: partial(load_and_save, source, out),
        THERE: partial(hf_to_megatron, str(source), out, options),
        RETURN: partial(megatron_to_hf, source, out, options),
    }[way]


def measure(way: str, folder: Path, workers: int) -> tuple[float, int, int]:
    """Run a contestant once; return (seconds, peak growth of RssAnon, peak resident memory), in bytes."""
    quiet_libraries()
    if way == PEER:
        import transformers.models.llama.modeling_llama  # noqa: F401
    for path in (folder / SOURCE_OF[way]).rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass
    run = work(way, folder, workers)
    gc.collect()
    os.sync()
    before = anonymous = resident_bytes("RssAnon") or 0
    resident, done = 0, threading.Event()

    def watch() -> None:
        nonlocal anonymous, resident
        while not done.wait(SAMPLE_S):
            anonymous = max(anonymous, resident_bytes("RssAnon") or 0)
            resident = max(resident, resident_bytes("VmRSS") or 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    run()
    took = time.perf_counter() - start
    done.set()
    watcher.join()
    return took, anonymous - before, resident


def tried(way: str, folder: Path, workers: int) -> tuple[float, int, int]:
    """Call `measure` in a fresh process, and remove what it wrote."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        result = pool.submit(measure, way, folder, workers).result(timeout=1800)
    shutil.rmtree(folder / BACK)
    return result


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; needs three times the checkpoint (/tmp)")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2, help="threads of a conversion")
    parser.add_argument("--quick", action="store_true", help="0.2 GB, one round")
    args = parser.parse_args(arguments)
    rounds, console = 1 if args.quick else args.rounds, Console(width=max(Console().width, 120))
    quiet_libraries()
    results: dict[str, list[tuple[float, int, int]]] = {way: [] for way in SOURCE_OF}
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary, Progress(console=console) as progress:
        folder = Path(temporary)
        task = progress.add_task("turns", total=rounds * len(results))
        make_checkpoint(folder / HF, QUICK if args.quick else {})
        hf_to_megatron(str(folder / HF), folder / MEGATRON, ConversionOptions(args.workers, SHARD_BYTES))
        source = HFSource(folder / HF, read_model_config(folder / HF))
        sizes = [spec.num_bytes for spec in source.specs.values()]
        source.close()
        ways = list(results)
        for number in range(rounds):
            first = number % len(ways)
            for way in ways[first:] + ways[:first]:
                results[way].append(tried(way, folder, args.workers))
                progress.advance(task)
    report(console, results, sum(sizes), max(sizes), args.workers)
    return 0


def report(
    console: Console, results: dict[str, list[tuple[float, int, int]]], total: int, largest: int, workers: int
) -> None:
    """Print medians and their ratios to the copy, with the range of the ratios over rounds."""
    allowed = MOST_TENSORS * largest + MOST_MORE
    table = Table(
        title=f"{total / 1e9:.2f} GB of bfloat16, largest tensor {largest / 1e6:.0f} MB, {workers} workers; "
        f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores",
        caption=f"limits: {MOST_TIME} of the copy, {MOST_TENSORS} x the largest tensor + {MOST_MORE / 1e6:.0f} MB = "
        f"{allowed / 1e6:.0f} MB of anonymous memory",
    )
    for column in ("", "seconds", "of the copy", "range", "anonymous MB", "resident MB"):
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for way, runs in results.items():
        seconds, anonymous, resident = zip(*runs, strict=True)
        ratio = span = ""
        if way in LIMIT_OF:
            limit = [run[0] for run in results[LIMIT_OF[way]]]
            ratios = [a / b for a, b in zip(seconds, limit, strict=True)]
            ratio = f"{statistics.median(seconds) / statistics.median(limit):.2f}"
            span = f"{min(ratios):.2f} - {max(ratios):.2f}"
        memory = (f"{max(anonymous) / 1e6:.0f}", f"{max(resident) / 1e6:.0f}")
        table.add_row(way, f"{statistics.median(seconds):.1f}", ratio, span, *memory)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
