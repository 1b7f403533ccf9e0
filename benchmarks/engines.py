"""Measures whole training jobs of both engines beside TRL's trainers on GSM8K lengths, alone and on two processes.

    python -m benchmarks.engines [--quick] [--data train.jsonl] [--trl-python PATH] [--only WORDS] [--rounds 3]

Each contender is a job of its own in fresh processes (imports count), on the same random Llama, records, tokens a step
(as near as whole sequences allow) and tokens a micro-batch; fp32, one thread a process, gloo, AdamW, no recomputation.
Contenders take turns, round after round, because a machine's speed drifts; figures are medians over the rounds. Speeds
are those of the steps after the first, from the end of one step to the end of the next. CPU seconds are those of all
processes: other work on the machine changes them little, wall time much. TRL runs in its own environment if one is
given. A second table has the cost of ZeRO in one process, where engines take turns step by step.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.contenders.run import Contender, Failed, Run, outputs_of, run
from benchmarks.step import DATA, LLAMA_58M, read_pairs, synthetic_pairs
from megalign.runtime.quiet import quiet_libraries

LLAMA_QUICK = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "vocab_size": 4096}
SPECIAL = ("<eos>", "<pad>")  # the tokenizer's first ids
RATE = 1e-5
TIMEOUT_S = 1800.0
PLAIN = "plain torch loop"  # as benchmarks.contenders.overhead names it
PACKED, PRECOMPUTED = "TRL packed", "TRL, reference precomputed"
Pair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Task:
    """Holds what contenders share: the files, and how many tokens and sequences make a step."""

    folder: Path
    micro_tokens: int
    micro_batches: int  # of a step, over all processes
    mean_length: float  # tokens of a sequence
    steps: int

    @property
    def micro_sequences(self) -> int:
        """Return how many sequences fill a micro-batch; an even number."""
        return max(2, int(self.micro_tokens / self.mean_length / 2) * 2)

    @property
    def groups(self) -> dict[str, int]:
        """Return the number of groups of a step by loss."""
        sequences = self.micro_sequences * self.micro_batches
        return {"sft": sequences, "dpo": sequences // 2}


def write_model(folder: Path, sizes: dict[str, Any]) -> None:
    """Write a random Llama and a tokenizer whose words are numbers."""
    # Imported here: the contenders' start is measured without them, and --help should not wait.
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=0, pad_token_id=None)).save_pretrained(folder)
    words = [*SPECIAL, *map(str, range(len(SPECIAL), sizes["vocab_size"]))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[1], model_max_length=16384
    ).save_pretrained(folder)


def write_records(task: Task, pairs: Sequence[Pair], vocab_size: int) -> None:
    """Write as many records of each kind as the steps take, and some more for packed rows."""

    def words(ids: Sequence[int]) -> str:
        return " ".join(str(len(SPECIAL) + each % (vocab_size - len(SPECIAL))) for each in ids)

    texts = [(words(prompt), " " + words(response)) for prompt, response in pairs]
    sft = [{"prompt": prompt, "completion": response} for prompt, response in texts]
    dpo = [
        {"prompt": prompt, "chosen": response, "rejected": other}
        for (prompt, response), (_, other) in zip(
            texts, itertools.islice(itertools.cycle(texts), 1, None), strict=False
        )
    ]
    counts = {"sft": task.groups["sft"] * task.steps * 13 // 10, "dpo": task.groups["dpo"] * task.steps}
    for loss, records in (("sft", sft), ("dpo", dpo)):
        lines = "".join(json.dumps(record) + "\n" for record in records[: counts[loss]])
        (task.folder / f"{loss}.jsonl").write_text(lines, encoding="utf-8")


def contenders(task: Task, loss: str, trl_python: str) -> list[Contender]:
    """Return all ways to train with a loss; the first of TRL's is what the others are compared with."""
    found = [_megalign(task, loss, "megatron", 0), *(_megalign(task, loss, "deepspeed", stage) for stage in (1, 2, 3))]
    kinds: list[tuple[str, dict[str, Any]]]
    if loss == "sft":
        kinds = [(PACKED, {"packing": True}), ("TRL padded", {"packing": False})]
    else:
        kinds = [(PRECOMPUTED, {"precompute": True}), ("TRL, reference in the step", {"precompute": False})]
    kinds += [(f"{kinds[0][0]}, DeepSpeed ZeRO-{stage}", kinds[0][1] | {"zero": stage}) for stage in (2, 3)]
    return found + [_trl(task, loss, name, settings, trl_python) for name, settings in kinds]


def _megalign(task: Task, loss: str, engine: str, stage: int) -> Contender:
    config = {
        "run": {"dir": "runs/benchmark", "dtype": "fp32"},
        "model": {"path": str(task.folder / "model")},
        "data": {
            "path": str(task.folder / f"{loss}.jsonl"),
            "max_length": task.micro_tokens,
            "groups_per_step": task.groups[loss],
            "tokens_per_micro_batch": task.micro_tokens,
        },
        "loss": {"name": loss},
        "optimizer": {"lr": RATE, "weight_decay": 0.0, "clip_norm": 1.0},
        "engine": {"name": engine} | ({"zero": {"stage": stage}} if stage else {}),
    }
    path = task.folder / f"{loss}-{engine}-{stage}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    name = f"megalign, {engine}" + (f" ZeRO-{stage}" if stage else "")
    return Contender(name, sys.executable, "benchmarks.contenders.megalign_job", (str(path),))


def _trl(task: Task, loss: str, name: str, settings: dict[str, Any], python: str) -> Contender:
    packing = settings.get("packing", False)
    sequences = task.micro_sequences if loss == "sft" else task.micro_sequences // 2  # TRL counts pairs
    content = {
        "loss": loss,
        "model": str(task.folder / "model"),
        "data": str(task.folder / f"{loss}.jsonl"),
        "max_length": task.micro_tokens,
        "batch": 1 if packing else sequences,
        "micro_batches": task.micro_batches,
        "lr": RATE,
        "zero": 0,
        **settings,
    }
    path = task.folder / f"{loss}-{name.replace(' ', '_').replace(',', '')}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return Contender(name, python, "benchmarks.contenders.trl_job", (str(path),))


def take_turns(
    names: Sequence[Contender], *, rounds: int, processes: int, steps: int, console: Console
) -> dict[str, list[Run] | str]:
    """Return {name: runs of all rounds, or the line with which the contender failed}."""
    results: dict[str, list[Run] | str] = {contender.name: [] for contender in names}
    for number, contender in itertools.product(range(rounds), names):
        runs = results[contender.name]
        if isinstance(runs, str):
            continue
        try:
            runs.append(run(contender, processes=processes, steps=steps, timeout_s=TIMEOUT_S))
        except Failed as problem:
            results[contender.name] = str(problem)
        last = results[contender.name]
        said = last if isinstance(last, str) else f"{last[-1].cpu:.3f} CPU s a 1000 tokens"
        console.print(f"[dim]round {number + 1}, {processes} processes, {contender.name}: {said}", highlight=False)
    return results


def table(results: dict[str, list[Run] | str], title: str) -> Table:
    """Return the contenders' medians, and each round's ratio to TRL's first contender."""
    base = results.get(PACKED) or results.get(PRECOMPUTED) or ""
    shown = Table(
        title=title, caption="x: CPU seconds a token of the first of TRL's over this one's, and its range over rounds"
    )
    for column in (
        "", "tokens/s", "CPU s/1000 tokens", "x", "CPU s/step", "peak MB", "s to step 1", "CPU s in all"
    ):  # fmt: skip
        shown.add_column(column, justify="right" if column else "left")
    for name, runs in results.items():
        if isinstance(runs, str):
            shown.add_row(name, runs)
            continue
        ratios = [] if isinstance(base, str) else [other.cpu / mine.cpu for mine, other in zip(runs, base, strict=True)]
        median = [
            statistics.median(getattr(each, field) for each in runs)
            for field in ("speed", "cpu", "step_cpu", "peak", "first", "whole_cpu")
        ]
        speeds = [each.speed for each in runs]
        shown.add_row(
            name,
            rf"{median[0]:.0f} \[{min(speeds):.0f} - {max(speeds):.0f}]",
            f"{median[1]:.3f}",
            "" if not ratios else rf"{statistics.median(ratios):.2f} \[{min(ratios):.2f} - {max(ratios):.2f}]",
            f"{median[2]:.2f}",
            f"{median[3] / 1e6:.0f}",
            f"{median[4]:.1f}",
            f"{median[5]:.1f}",
        )
    return shown


def overhead(task: Task, steps: int) -> dict[str, list[float]]:
    """Return {name: CPU seconds of each step but the first} of engines that take turns in one process."""
    paths = [found.arguments[0] for found in contenders(task, "sft", sys.executable)[:4]]
    contender = Contender("overhead", sys.executable, "benchmarks.contenders.overhead", tuple(paths))
    times: dict[str, list[float]] = outputs_of(contender, processes=1, steps=steps, timeout_s=TIMEOUT_S)[0]
    return times


def overhead_table(times: dict[str, list[float]], results: dict[str, list[Run] | str]) -> Table:
    """Return what ZeRO adds to a plain loop's CPU seconds, and DeepSpeed to those of TRL's jobs in one process."""
    shown = Table(title="What ZeRO adds in one process", caption="medians, and the range of single comparisons")
    for column in ("", "beside", "CPU s", "added CPU"):
        shown.add_column(column, justify="left" if column in ("", "beside") else "right")
    pairs = [(name, PLAIN, mine, times[PLAIN]) for name, mine in times.items() if name != PLAIN]
    for name, runs in results.items():
        base = results.get(name.partition(", DeepSpeed")[0])
        if ", DeepSpeed" in name and isinstance(runs, list) and isinstance(base, list):
            base_name = name.partition(", DeepSpeed")[0]
            pairs.append((name, base_name, [each.cpu for each in runs], [each.cpu for each in base]))
    for name, base_name, mine, others in pairs:
        added = [each / other - 1 for each, other in zip(mine, others, strict=True)]
        spread = f"{statistics.median(added):+.1%} ({min(added):+.1%} to {max(added):+.1%})"
        unit = "a step" if base_name == PLAIN else "a 1000 tokens"
        shown.add_row(name, base_name, f"{statistics.median(mine):.3f} {unit}", spread)
    return shown


def versions(python: str, names: Sequence[str]) -> str:
    """Return the versions of packages in an environment, in words."""
    code = (
        "from importlib.metadata import version, packages_distributions as p\n"
        "import sys\nknown = {d for each in p().values() for d in each}\n"
        "print(', '.join(f'{n} {version(n)}' for n in sys.argv[1:] if n in known))"
    )
    return subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=False).stdout.strip()


def machine() -> str:
    """Return the processor, its cores and the day, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}; {datetime.date.today()}"


def main(arguments: Sequence[str]) -> int:
    """Run the contenders and print the tables."""
    options = parsed(arguments)
    quiet_libraries()
    console = Console(width=None if sys.stdout.isatty() else 160)
    pairs = read_pairs(options.data) if options.data.is_file() else synthetic_pairs(7473)
    random.Random(0).shuffle(pairs)
    sizes = LLAMA_58M | (LLAMA_QUICK if options.quick else {})
    mean = statistics.mean(len(prompt) + len(response) + 1 for prompt, response in pairs)
    with tempfile.TemporaryDirectory() as name:
        task = Task(Path(name), options.micro_batch, options.tokens // options.micro_batch, mean, options.steps)
        write_model(task.folder / "model", sizes)
        write_records(task, pairs, sizes["vocab_size"])
        console.print(
            f"Llama of hidden {sizes['hidden_size']}, {sizes['num_hidden_layers']} layers, vocabulary "
            f"{sizes['vocab_size']}; fp32, one thread a process; steps of {options.tokens} tokens at most, micro-"
            f"batches of {task.micro_tokens}; {task.steps} steps; sequences of {mean:.0f} tokens on average, "
            f"{'of GSM8K' if options.data.is_file() else 'lengths drawn like those of GSM8K'}\n{machine()}\n"
            f"here: {versions(sys.executable, ('torch', 'transformers', 'megatron-core', 'deepspeed'))}\n"
            f"TRL: {versions(options.trl_python, ('torch', 'transformers', 'trl', 'accelerate', 'deepspeed'))}",
            highlight=False,
        )
        alone: dict[str, list[Run] | str] = {}
        for loss, processes in itertools.product(options.loss, options.processes):
            chosen = [each for each in contenders(task, loss, options.trl_python) if options.only in each.name]
            results = take_turns(chosen, rounds=options.rounds, processes=processes, steps=task.steps, console=console)
            console.print(table(results, f"{loss.upper()}, {processes} process{'es' * (processes > 1)}"))
            alone |= results if processes == 1 else {}
        if options.overhead_steps:
            console.print(overhead_table(overhead(task, options.overhead_steps + 1), alone))
    return 0


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; `--quick` is a smaller model, one round and fewer tokens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="JSONL with question and answer")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter of TRL's environment (default: this)")
    parser.add_argument("--only", default="", help="part of the names of the contenders to run (default: all)")
    parser.add_argument("--loss", nargs="+", choices=("sft", "dpo"), default=["sft", "dpo"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--tokens", type=int, help="of a step (default 4096, quick 1024)")
    parser.add_argument("--micro-batch", type=int, help="its tokens (default 2048, quick 512)")
    parser.add_argument("--steps", type=int, help="the first is a warm-up (default 5, quick 3)")
    parser.add_argument("--rounds", type=int, help="default 3, quick 1")
    parser.add_argument("--overhead-steps", type=int, default=5, help="steps of the second table; 0 leaves it out")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    for name, value, quick in (("tokens", 4096, 1024), ("micro_batch", 2048, 512), ("steps", 5, 3), ("rounds", 3, 1)):
        setattr(options, name, getattr(options, name) or (quick if options.quick else value))
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
