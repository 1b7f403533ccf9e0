"""Measures tokens per second of a training step on GSM8K lengths, against plain torch on perfectly packed tokens.

    python -m benchmarks.step [--quick] [--data train.jsonl] [--tokens 4096] [--rounds 3]

All contestants run in one process on one thread and take turns, because a machine's speed drifts. Time is CPU time,
which equals wall time on an idle machine and ignores other processes. Forward and backward, no optimizer. The limit is
a plain transformers Llama on the same number of tokens without padding: its rows are full, and its head computes as
many tokens as there are response tokens. Two row shapes are timed (one long row, and rows of the mean length), each
with whole and with half micro-batches; the fastest is the limit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import re
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from megalign.config.layout import Layout
from megalign.convert import read_model_config
from megalign.data.group import Response, TokenSequence
from megalign.data.packing import Packing
from megalign.engines.megatron.engine import AdamW, MegatronEngine
from megalign.engines.megatron.groups import make_groups
from megalign.engines.megatron.shard import EngineOptions
from megalign.engines.scoring import Scored
from megalign.engines.step import StepBatch, accumulate
from megalign.losses.gvpo import GvpoConfig
from megalign.losses.sft import SftConfig
from megalign.runtime.distributed import process_group
from megalign.runtime.quiet import quiet_libraries

DATA = Path(__file__).resolve().parents[2] / "shared/data/gsm8k/train.jsonl"
VOCABULARY = 32000
LLAMA_58M = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
}
# Mean and deviation of the logarithm of GSM8K's lengths in the tokens of `token_ids`, for runs without the file.
PROMPT_LOG_LENGTH, RESPONSE_LOG_LENGTH = (4.095, 0.369), (4.789, 0.417)
SAMPLES = 4  # responses of a GVPO group

Run = Callable[[], object]


def token_ids(text: str) -> tuple[int, ...]:
    """Tokenise without a downloaded tokenizer: pieces of up to five letters, single digits and marks."""
    pieces = re.findall(r"\s?[^\W\d_]{1,5}|\d|[^\w\s]|\n", text)
    return tuple(zlib.crc32(piece.encode()) % VOCABULARY for piece in pieces)


def read_pairs(path: Path) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return (prompt ids, response ids) of every record."""
    with open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [(token_ids(record["question"]), token_ids(record["answer"])) for record in records]


def synthetic_pairs(count: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Draw random ids in sequences whose lengths are distributed like GSM8K's."""
    draw = random.Random(0)

    def ids(log_mean: float, log_deviation: float) -> tuple[int, ...]:
        length = max(1, round(draw.lognormvariate(log_mean, log_deviation)))
        return tuple(draw.randrange(VOCABULARY) for _ in range(length))

    return [(ids(*PROMPT_LOG_LENGTH), ids(*RESPONSE_LOG_LENGTH)) for _ in range(count)]


def take_sequences(path: Path, tokens: int, console: Console) -> list[TokenSequence]:
    """Draw random whole sequences of about `tokens` tokens in total."""
    if path.is_file():
        pairs = read_pairs(path)
    else:
        console.print(f"{path} is not there: synthetic sequences with the length distribution of GSM8K instead")
        pairs = synthetic_pairs(2000)
    random.Random(0).shuffle(pairs)
    total = itertools.accumulate(len(prompt) + len(response) for prompt, response in pairs)
    count = max(SAMPLES, sum(1 for length in total if length <= tokens))
    return [
        TokenSequence(index, index, "response", prompt, Response(response))
        for index, (prompt, response) in enumerate(pairs[:count])
    ]


def plain_step(model: LlamaForCausalLM, token_BL: Tensor, scored: int, micro_batches: int) -> None:
    """Run forward and backward of plain transformers over full rows; the head computes `scored` tokens."""
    model.zero_grad(set_to_none=True)
    for rows_BL in token_BL.chunk(micro_batches):
        hidden_TH = model.model(input_ids=rows_BL, use_cache=False).last_hidden_state.flatten(0, 1)
        count = min(len(hidden_TH), round(scored / micro_batches))
        logits_NV = model.lm_head(hidden_TH[-count:])
        F.cross_entropy(logits_NV, rows_BL.flatten()[-count:], reduction="sum").backward()


def limits(model: LlamaForCausalLM, sequences: Sequence[TokenSequence], micro_batch: int) -> dict[str, tuple[Run, int]]:
    """Return {name: (one step of plain torch, its tokens)}, for each way to fill rows and micro-batches."""
    tokens, scored = sum(map(len, sequences)), sum(sequence.num_scored for sequence in sequences)
    runs: dict[str, tuple[Run, int]] = {}
    for budget in (micro_batch, micro_batch // 2):
        parts = max(1, round(tokens / budget))
        mean = round(tokens / len(sequences))
        for rows, length in ((1, tokens // parts), (-(-len(sequences) // parts), mean)):
            name = f"plain torch, {rows} x {length}"
            ids_BL = torch.randint(VOCABULARY, (rows * parts, length), generator=torch.Generator().manual_seed(0))
            share = round(scored * ids_BL.numel() / tokens)
            runs[name] = partial(plain_step, model, ids_BL, share, parts), ids_BL.numel()
    return runs


def steps(engine: MegatronEngine, sequences: Sequence[TokenSequence], micro_batch: int) -> dict[str, tuple[Run, int]]:
    """Return {name: (one step of this project, its tokens)}."""
    tokens = sum(map(len, sequences))
    packed, padded = Packing(micro_batch), Packing(micro_batch, pack=False)
    sft = StepBatch(sequences, num_groups=len(sequences))
    whole = len(sequences) // SAMPLES * SAMPLES
    samples = [
        replace(sequence, group=index // SAMPLES, response=replace(sequence.response, reward=float(index % SAMPLES)))
        for index, sequence in enumerate(sequences[:whole])
    ]
    reference = [Scored(-10.0 * sequence.num_scored) for sequence in samples]
    gvpo = StepBatch(samples, num_groups=whole // SAMPLES, reference=reference)
    return {
        "SFT packed": (lambda: accumulate(engine, sft, SftConfig(), packing=packed), tokens),
        "SFT padded": (lambda: accumulate(engine, sft, SftConfig(), packing=padded), tokens),
        "GVPO packed, two passes": (
            lambda: accumulate(engine, gvpo, GvpoConfig(), packing=packed, mode="two_pass"),
            sum(map(len, samples)),
        ),
    }


def take_turns(contestants: dict[str, tuple[Run, int]], rounds: int) -> dict[str, list[float]]:
    """Return {name: tokens per second in each round}; all run once a round, after a warm-up round."""
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(rounds + 1):
        for name, (run, tokens) in contestants.items():
            start = time.process_time()
            run()
            if round_number:
                speeds[name].append(tokens / (time.process_time() - start))
    return speeds


def report(speeds: dict[str, list[float]], title: str, console: Console) -> None:
    """Print medians, and the median over rounds of each row's ratio to the limit."""
    limit = max((name for name in speeds if name.startswith("plain")), key=lambda name: statistics.median(speeds[name]))
    table = Table(title=title, caption=f"limit: {limit}; ratios are medians over rounds of neighbours in time")
    for column, side in (("", "left"), ("tokens/s", "right"), ("of the limit", "right"), ("range", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for name, values in speeds.items():
        ratios = [mine / best for mine, best in zip(values, speeds[limit], strict=True)]
        spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
        table.add_row(name, f"{statistics.median(values):.0f}", f"{statistics.median(ratios):.2f}", spread)
    console.print(table)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="JSONL with question and answer")
    parser.add_argument("--tokens", type=int, help="tokens of a step (default 4096, quick 2048)")
    parser.add_argument("--micro-batch", type=int, default=2048, help="tokens of a micro-batch, of all contestants")
    parser.add_argument("--rounds", type=int, help="rounds that count (default 3, quick 2)")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    quiet_libraries()
    tokens = options.tokens or (2048 if options.quick else 4096)
    torch.set_num_threads(1)
    console = Console()
    sequences = take_sequences(options.data, tokens, console)
    with process_group(timeout_s=600) as world, tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_58M, attn_implementation="sdpa")).train()
        model.save_pretrained(folder)
        groups = make_groups(Layout(), timeout_s=600)
        engine = MegatronEngine(
            read_model_config(Path(folder)), groups, EngineOptions(torch.float32, world.device), adamw=AdamW()
        )
        engine.load_weights(Path(folder))
        model.to(world.device)
        contestants = limits(model, sequences, options.micro_batch) | steps(engine, sequences, options.micro_batch)
        speeds = take_turns(contestants, options.rounds or (2 if options.quick else 3))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    lengths = [len(sequence) for sequence in sequences]
    title = (
        f"{millions:.0f}M Llama, fp32, one thread, forward and backward; {len(lengths)} sequences of "
        f"{min(lengths)}-{max(lengths)} tokens (mean {statistics.mean(lengths):.0f}), {sum(lengths)} in all, "
        f"micro-batch {options.micro_batch}; torch {torch.__version__}, {platform.machine()}"
    )
    report(speeds, title, console)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
