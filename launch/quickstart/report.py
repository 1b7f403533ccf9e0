"""Reports held-out accuracy of the quickstart's models: a table, some answers, summary.json and curves.png.

Run: python launch/quickstart/report.py runs/quickstart --started UNIX_SECONDS
Every model is what `export.hf_dir` wrote, loaded by transformers and decoded greedily.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from megalign.rollout.prompts import plain_text
from megalign.rollout.rewards import choose_reward
from megalign.rollout.sampler import SamplingPlan
from megalign.rollout.transformers_sampler import TransformersSampler, end_ids

MODELS = {  # key in summary.json: (folder, description)
    "base": ("sft", "SFT, a few steps (base)"),
    "gvpo": ("gvpo", "base + GVPO rounds"),
    "epa": ("epa", "base + EPA on samples of the base"),
    "sft_noisy": ("sft_noisy", "base + SFT on noisy answers"),
    "poft": ("poft", "base + PoFT on the same, GVPO model as teacher"),
}
LONGEST_ANSWER = 4  # three digits and the end


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer(hf_dir: Path, problems: Sequence[dict[str, Any]]) -> list[str]:
    """Return the model's greedy answers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(hf_dir), AutoTokenizer.from_pretrained(hf_dir)
    groups = TransformersSampler(model, end_ids(model, tokenizer)).sample(
        [tuple(tokenizer(problem["prompt"], add_special_tokens=False)["input_ids"]) for problem in problems],
        [(0,)] * len(problems),
        SamplingPlan(k=1, temperature=0, max_new_tokens=LONGEST_ANSWER),
    )
    return [plain_text(tokenizer, group[0].ids) for group in groups]


def accuracy(answers: Sequence[str], problems: Sequence[dict[str, Any]]) -> float:
    """Return the fraction of answers with the full score; reasoning-gym also gives partial scores."""
    score = choose_reward("reasoning_gym")
    scores = [score(problem["prompt"], text, problem, "held_out") for text, problem in zip(answers, problems)]
    return sum(value == 1 for value in scores) / len(problems)


def show(console: Console, accuracies: dict[str, float], answers: dict[str, list[str]], problems: list[Any]) -> None:
    """Print a table of all models, and one of some problems: first those where base and GVPO differ."""
    table = Table(title=f"Exact answers to {len(problems)} held-out problems")
    for title in ("model", "accuracy", "against base"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for name, (_, done) in MODELS.items():
        table.add_row(done, f"{accuracies[name]:.3f}", f"{accuracies[name] - accuracies['base']:+.3f}")
    console.print(table)
    samples = Table(title="Some answers")
    for title in ("problem", "right", *MODELS):
        samples.add_column(title, justify="right")
    order = sorted(range(len(problems)), key=lambda index: answers["base"][index] == answers["gvpo"][index])
    for index in order[:6] + order[-2:]:
        texts = (answers[name][index] for name in MODELS)
        samples.add_row(problems[index]["prompt"], problems[index]["answer"], *texts)
    console.print(samples)


def draw(folder: Path, accuracies: dict[str, float]) -> None:
    """Write curves.png: GVPO's reward by round, all losses by step, held-out accuracy by model."""
    figure, (rewards, losses, bars) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    steps = {name: read_lines(folder / part / "metrics.jsonl") for name, (part, _) in MODELS.items()}
    lines = steps["gvpo"]
    sampled = [line for line in lines if "reward_mean" in line]  # step 0 is an evaluation alone
    rewards.plot([line["step"] for line in sampled], [line["reward_mean"] for line in sampled], label="samples")
    held_out = [line for line in lines if "eval_reward" in line]
    rewards.plot(
        [line["step"] for line in held_out], [line["eval_reward"] for line in held_out], label="held out, greedy"
    )
    rewards.set(title="GVPO: mean reward", xlabel="step", ylim=(0, 1))
    for name, every in steps.items():
        lines = [line for line in every if "loss" in line]
        losses.plot([line["step"] for line in lines], [line["loss"] for line in lines], label=name, linewidth=1)
    losses.set(title="loss, each its own", xlabel="step", yscale="log")
    bars.bar(list(accuracies), list(accuracies.values()))
    bars.bar_label(bars.containers[0], fmt="%.2f")
    bars.set(title="held-out accuracy", ylim=(0, 1.05))
    rewards.legend(loc="lower right")
    losses.legend()
    figure.savefig(folder / "curves.png", dpi=120)


def main() -> None:
    """Let every model answer the held-out problems, and print and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--started", type=float, required=True, help="Unix time when the runs began")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    problems = read_lines(args.folder / "data" / "held_out.jsonl")
    answers = {name: answer(args.folder / part / "hf", problems) for name, (part, _) in MODELS.items()}
    accuracies = {name: accuracy(answers[name], problems) for name in MODELS}
    console = Console(width=110)
    show(console, accuracies, answers, problems)
    draw(args.folder, accuracies)
    summary = {
        **{f"{name}_accuracy": value for name, value in accuracies.items()},
        "held_out_problems": len(problems),
        "seconds": round(time.time() - args.started, 1),
        "hf_dir": str(args.folder / "gvpo" / "hf"),
    }
    (args.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.print(f"{args.folder}/summary.json and curves.png written after {summary['seconds']:.0f} s")


if __name__ == "__main__":
    main()
