"""Peak memory of a training step on GSM8K lengths and a large vocabulary, with this head and with plain logits.

    python benchmarks/step_memory.py [--quick] [--data train.jsonl] [--tokens 4096] [--vocabulary 128256]

The same engine, model and micro-batch each time; only the objective differs: this project's head, or all logits of the
scored tokens at once with torch's log-softmax, as fp32 needs them, or the same for every token of the micro-batch as
trainers do that drop unscored tokens only in the loss. The floor is a step that ends in the hidden states: what the
other layers take, whatever the head. Each contestant runs in a fresh process. Its figure is the growth of resident
memory during one step (forward and backward, no optimizer) over what weights and gradient buffers hold before it, from
the kernel's own high-water mark, which is reset before the step; so it includes what libraries take for themselves.
CPU, one thread, fp32.
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
from logp_memory import resident_bytes, settle
from rich.console import Console
from rich.table import Table
from step import DATA, LLAMA_58M, take_sequences
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megalign.convert import read_model_config
from megalign.data.batch import MicroBatch
from megalign.data.group import Sequence as FlatSequence
from megalign.engines.engine import Head
from megalign.engines.groups import make_groups
from megalign.engines.megatron import AdamW, EngineOptions, MegatronEngine
from megalign.engines.scoring import Cutting, Scored, cut_batch
from megalign.engines.step import StepBatch, accumulate
from megalign.losses.gvpo import GvpoConfig
from megalign.losses.sft import SftConfig
from megalign.runtime.distributed import process_group
from megalign.runtime.quiet import quiet_libraries

SAMPLES = 4  # responses of a GVPO group
FLOOR, SFT, GVPO = "no head", "this head, SFT", "this head, GVPO in two passes"
PLAIN, EVERY = "plain logits of scored tokens", "plain logits of all tokens"


def plain_objective(place: int, head: Head) -> tuple[Tensor, Any]:
    """Cross-entropy sum of the head's tokens from all their logits at once."""
    real = head.shard.vocab_size
    logits_NV = (head.hidden_LH @ head.weight_VH[:real].t()).float()
    logp_N = logits_NV.log_softmax(dim=1).gather(1, head.target_N[:, None]).squeeze(1)
    return -logp_N.sum(), float(logp_N.detach().sum())


def floor_objective(place: int, head: Head) -> tuple[Tensor, Any]:
    """No head at all."""
    return head.hidden_LH.sum(), None


def every_token(batch: MicroBatch) -> MicroBatch:
    """The micro-batch with each of its positions scored, as a trainer has it that masks only in the loss."""
    count = len(batch.token_T)
    return replace(
        batch, scored_N=torch.arange(count), target_N=batch.token_T.clone(), seq_N=torch.zeros(count, dtype=torch.int64)
    )


def take_step(engine: MegatronEngine, sequences: Sequence[FlatSequence], tokens: int, way: str) -> None:
    """One step's gradient."""
    cutting = Cutting(tokens)
    if way == SFT:
        accumulate(engine, StepBatch(sequences, num_groups=len(sequences)), SftConfig(), cutting=cutting)
    elif way == GVPO:
        samples = [
            replace(one, group=place // SAMPLES, response=replace(one.response, reward=float(place % SAMPLES)))
            for place, one in enumerate(sequences)
        ]
        reference = [Scored(-10.0 * one.num_scored) for one in samples]
        batch = StepBatch(samples, num_groups=len(samples) // SAMPLES, reference=reference)
        accumulate(engine, batch, GvpoConfig(), cutting=cutting, mode="two_pass")
    else:
        batches = cut_batch(engine, sequences, coupled=False, cutting=cutting).batches
        batches = [every_token(one) for one in batches] if way == EVERY else batches
        engine.backward(batches, floor_objective if way == FLOOR else plain_objective)


def measure(way: str, folder: Path, sequences: Sequence[FlatSequence], tokens: int) -> tuple[int, float]:
    """(bytes by which resident memory grew in a step, seconds of the thread)."""
    quiet_libraries()
    torch.set_num_threads(1)
    with process_group(timeout_s=600) as world:
        groups = make_groups(tensor=1, pipeline=1, timeout_s=600)
        engine = MegatronEngine(
            read_model_config(folder), groups, EngineOptions(torch.float32, world.device), adamw=AdamW()
        )
        engine.load_weights(folder)
        take_step(engine, sequences[:SAMPLES], tokens, way)  # libraries set themselves up, buffers are touched
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
    scored = sum(one.num_scored for one in sequences)
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
