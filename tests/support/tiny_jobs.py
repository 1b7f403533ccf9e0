"""Whole jobs of a second: a Llama of two layers, records of token ids, and the command line called in process."""

from __future__ import annotations

import functools
import gc
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megalign.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
NOW = "run.max_minutes=1e-9"  # an override: the time is over after the first step
VOCAB_SIZE = 53  # prime: every split over ranks has padding rows
CHARACTERS = "0123456789+-=abcdefghijklmnopqrstuvwxyz ?"
SPECIAL = ["<eos>", "<unk>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_model(folder: Path, *, seed: int = 0, tokenizer: bool = False, **changes: Any) -> Path:
    """A random Llama whose log-probs are far from uniform; `changes` go into its configuration."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    save_drawn(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes})), folder)
    if tokenizer:
        write_tokenizer(folder)
    return folder


def save_drawn(model: Any, folder: Path) -> None:
    """Save a model after drawing every weight anew, so that log-probs are far from uniform; norms are near one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))
    model.save_pretrained(folder)


def write_tokenizer(folder: Path, *, characters: str = CHARACTERS, template: str = TEMPLATE) -> Any:
    """One token a character; another order of the characters is another tokenizer."""
    vocab = {token: number for number, token in enumerate(SPECIAL + list(characters))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", additional_special_tokens=SPECIAL[2:]
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_lines(path: Path, records: list[Any]) -> Path:
    """Write records as JSONL."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records(kind: str, count: int = 8) -> list[dict[str, Any]]:
    """Ragged records of token ids: `samples`, `pairs`, `singles`, or `scored` singles with teachers' scores."""
    draw = random.Random(f"{kind} {count}")

    def ids(length: int) -> list[int]:
        return [draw.randrange(VOCAB_SIZE) for _ in range(length)]

    def one(number: int) -> dict[str, Any]:
        prompt = {"prompt_ids": ids(2 + number % 3)}
        if kind == "samples":
            sizes = range(2 + number % 4)
            answers = [{"response_ids": ids(2 + (number + at) % 5), "reward": draw.random()} for at in sizes]
            return {**prompt, "responses": answers}
        if kind == "pairs":
            return {**prompt, "chosen_ids": ids(2 + number % 4), "rejected_ids": ids(3)}
        scores = {"teacher_scores": {"a": -draw.random(), "b": -draw.random()}} if kind == "scored" else {}
        return {**prompt, "response_ids": ids(1 + number % 5), **scores}

    return [one(number) for number in range(count)]


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` on top of `base`, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return {key: value for key, value in merged.items() if value is not None}


def write_config(folder: Path, **changes: Any) -> Path:
    """`folder`/job.yaml: a GVPO job of three steps in fp32 over `folder`/data.jsonl; `None` leaves a key out."""
    base = {
        "run": {"dir": str(folder / "run"), "steps": 3, "dtype": "fp32"},
        "model": {"path": str(folder / "model")},
        "data": {
            "path": str(folder / "data.jsonl"),
            "max_length": 32,
            "groups_per_step": 3,
            "tokens_per_micro_batch": 48,
        },
        "loss": {"name": "gvpo"},
        "optimizer": {"lr": 1e-3, "eps": 1e-5},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(merge(base, changes)))
    return path


def round_sections(folder: Path, **rollout: Any) -> dict[str, Any]:
    """Changes of `write_config` for two rounds of two updates of two prompts with three responses each."""
    prompts = [{"prompt": f"{number}+{number % 3}=", "bonus": number / 7} for number in range(7)]
    sections = {
        "path": str(write_lines(folder / "prompts.jsonl", prompts)),
        "rounds": 2,
        "prompts_per_round": 4,
        "k": 3,
        "max_new_tokens": 6,
        "updates_per_round": 2,
        "reward": "tests.support.tiny_jobs:digits",
    }
    return {
        "run": {"steps": None},
        "data": {"path": None, "groups_per_step": None},
        "rollout": {**sections, **rollout},
        "optimizer": {"lr": 1e-3},
    }


def digits(prompt: str, response: str, record: dict[str, Any]) -> float:
    """Reward digits and short responses, so that random texts of many lengths get different rewards.

    `signal` in a record sends SIGTERM to rank 1 meanwhile; `spoil` puts somebody's file into the directory it names.
    """
    if record.get("signal") and os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    if record.get("spoil"):
        Path(record["spoil"]).mkdir(exist_ok=True)
        Path(record["spoil"], "notes.txt").write_text("somebody's")
    return sum(character.isdigit() for character in response) - len(response) / 8 + record["bonus"]


def misbehave(prompt: str, response: str, record: dict[str, Any]) -> float:
    """Exit, raise or hang as `does` in the record says, instead of returning a reward."""
    does = record.get("does")
    if does == "exit":
        sys.exit(0)
    if does == "raise":
        raise ValueError("no such answer")
    while does == "hang":
        pass
    return float(len(response))


def train(config: Path, *overrides: str) -> int:
    """Run `python -m megalign train` in this process, and return its exit code."""
    _keep_imports()
    try:
        return main(["train", str(config), *overrides])
    finally:
        gc.collect()  # ends the job's process groups and their threads


@functools.cache
def _keep_imports() -> None:
    """Exclude what is imported by now from garbage collections, of which every save makes one.

    Only once, because a later call would exclude garbage too.
    """
    gc.collect()
    gc.freeze()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl."""
    return read_lines(run_dir / "metrics.jsonl")


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Return the steps of a run's checkpoints, in order."""
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))


def status(run_dir: Path) -> dict[str, Any]:
    """Contents of a run's status.json."""
    found: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return found


CLOCKS = (
    "seconds", "tokens_per_second", "peak_memory_gb", "rollout_seconds", "round_seconds", "sampling_seconds",
    "scoring_seconds", "round_tokens_per_second", "eval_seconds", "time",
    "checkpoint_seconds", "checkpoint_stall_seconds",
)  # fmt: skip


def numbers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave clocks and memory out: the rest is the same whenever the same steps are taken."""
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def training_numbers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The numbers of the steps alone, whatever was evaluated beside them."""
    steps = [line for line in lines if line["step"]]
    return numbers([{key: value for key, value in line.items() if not key.startswith("eval_")} for line in steps])


def hf_logps(folder: Path, prompt_ids: list[int], response_ids: list[int], *, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs by response token from transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt_ids, *response_ids]])).logits[0].double() / temperature
    rows = logits.log_softmax(-1)[len(prompt_ids) - 1 : -1]
    return rows.gather(1, torch.tensor(response_ids)[:, None]).squeeze(1)
