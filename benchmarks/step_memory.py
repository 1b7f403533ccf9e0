"""Measures peak memory of a training step on GSM8K lengths and a large vocabulary, with this head and plain logits.

    python -m benchmarks.step_memory [--quick] [--data train.jsonl] [--tokens 4096] [--vocabulary 128256]

Engine, model and micro-batch are the same each time; only the objective differs: this project's head; fp32 logits of
all scored tokens at once with torch's log-softmax; or the same for every token of the micro-batch, as in trainers that
drop unscored tokens only in the loss. The floor is a step without a head, which shows the memory of the other layers.
Each contestant runs in a fresh process. Its figure is the growth of resident memory during one step (forward and
backward, no optimizer) above weights and gradient buffers, from the kernel's high-water mark, which is reset before the
step; so it includes memory that libraries allocate themselves. CPU, one thread, fp32.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.logp_memory import resident_bytes, settle
from benchmarks.step import DATA, LLAMA_58M, take_sequences
from megalign.config.layout import Layout
from megalign.convert import read_model_config
from megalign.data.group import TokenSequence
from megalign.data.micro_batch import MicroBatch
from megalign.data.packing import Packing, micro_batches
from megalign.engines.head import Head
from megalign.engines.megatron.engine import AdamW, MegatronEngine
from megalign.engines.megatron.groups import make_groups
from megalign.engines.megatron.shard import EngineOptions
from megalign.engines.scoring import Scored
from megalign.engines.step import StepBatch, accumulate
from megalign.losses.gvpo import GvpoConfig
from megalign.losses.sft import SftConfig
from megalign.runtime.distributed import process_group
from megalign.runtime.quiet import quiet_libraries

SAMPLES = 4  # responses of a GVPO group
FLOOR, SFT, GVPO = "no head", "this head, SFT", "this head, GVPO in two passes"
PLAIN, EVERY = "plain logits of scored tokens", "plain logits of all tokens"


def plain_objective(index: int, head: Head) -> tuple[Tensor, Any]:
    """Compute the summed cross-entropy of the head's tokens from all their logits at once."""
    real = head.shard.vocab_size
    logits_NV = (head.hidden_LH @ head.weight_VH[:real].t()).float()
    logp_N = logits_NV.log_softmax(dim=1).gather(1, head.target_M[:, None]).squeeze(1)
    return -logp_N.sum(), float(logp_N.detach().sum())


def floor_objective(index: int, head: Head) -> tuple[Tensor, Any]:
    """Return a loss without a head: the sum of the hidden states."""
    return head.hidden_LH.sum(), None


def every_token(batch: MicroBatch) -> MicroBatch:
    """Return the micro-batch with every position scored, as in a trainer that masks only in the loss."""
    count = len(batch.token_T)
    return replace(
        batch, scored_N=torch.arange(count), target_N=batch.token_T.clone(), seq_N=torch.zeros(count, dtype=torch.int64)
    )


def take_step(engine: MegatronEngine, sequences: Sequence[TokenSequence], tokens: int, way: str) -> None:
    """Compute the gradient of one step."""
    packing = Packing(tokens)
    if way == SFT:
        accumulate(engine, StepBatch(sequences, num_groups=len(sequences)), SftConfig(), packing=packing)
    elif way == GVPO:
        samples = [
            replace(each, group=index // SAMPLES, response=replace(each.response, reward=float(index % SAMPLES)))
            for index, each in enumerate(sequences)
        ]
        reference = [Scored(-10.0 * sample.num_scored) for sample in samples]
        batch = StepBatch(samples, num_groups=len(samples) // SAMPLES, reference=reference)
        accumulate(engine, batch, GvpoConfig(), packing=packing, mode="two_pass")
    else:
        batches = micro_batches(engine.shape, sequences, coupled=False, packing=packing).batches
        batches = [every_token(batch) for batch in batches] if way == EVERY else batches
        engine.backward(batches, floor_objective if way == FLOOR else plain_objective)


def measure(way: str, folder: Path, sequences: Sequence[TokenSequence], tokens: int) -> tuple[int, float]:
    """Run one step; return (growth of resident memory in bytes, CPU seconds)."""
    quiet_libraries()
    torch.set_num_threads(1)
    with process_group(timeout_s=600) as world:
        groups = make_groups(Layout(), timeout_s=600)
        engine = MegatronEngine(
            read_model_config(folder), groups, EngineOptions(torch.float32, world.device), adamw=AdamW()
        )
        engine.load_weights(folder)
        take_step(engine, sequences[:SAMPLES], tokens, way)  # warm-up: libraries initialise, buffers are touched
        before = settle()
        start = time.thread_time()
        take_step(engine, sequences, tokens, way)
        took, peak = time.thread_time() - start, resident_bytes("VmHWM")
        if before is None or peak is None:
            raise RuntimeError("needs Linux: /proc/self/status and clear_refs")
        return peak - before, took


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="JSONL with question and answer")
    parser.add_argument("--tokens", type=int, help="of the step, one micro-batch (default 4096, quick 1024)")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    tokens, console = options.tokens or (1024 if options.quick else 4096), Console()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # the libraries' advice, once a process
    sequences = take_sequences(options.data, tokens, console)
    sequences = sequences[: len(sequences) // SAMPLES * SAMPLES]
    scored = sum(sequence.num_scored for sequence in sequences)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**{**LLAMA_58M, "vocab_size": options.vocabulary})).save_pretrained(folder)
        table = Table(
            title=f"Llama with hidden {LLAMA_58M['hidden_size']}, {LLAMA_58M['num_hidden_layers']} layers, vocabulary "
            f"{options.vocabulary}, fp32, one thread; {sum(map(len, sequences))} tokens in {len(sequences)} sequences, "
            f"{scored} scored, one micro-batch; torch {torch.__version__}, {platform.machine()}",
            caption=f"fp32 logits of the scored tokens alone: {scored * options.vocabulary * 4 / 1e6:.0f} MB",
        )
        for column in ("", "growth in a step", "of it the head", "thread time"):
            table.add_column(column, justify="right" if column else "left", no_wrap=not column)
        floor = 0
        for way in (FLOOR, SFT, GVPO, PLAIN, EVERY):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                run = partial(measure, way, Path(folder), sequences, tokens)
                grown, seconds = pool.submit(run).result(timeout=3600)
            floor = grown if way == FLOOR else floor
            head = "" if way == FLOOR else f"{(grown - floor) / 1e6:.0f} MB"
            table.add_row(way, f"{grown / 1e6:.0f} MB", head, f"{seconds:.1f} s")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
