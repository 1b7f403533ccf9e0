"""Runs whole jobs of a random Qwen2 in bf16 through the command line, counting the host's waits."""

from __future__ import annotations

import gc
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.gpu.first_hour_parts.models import QWEN2, SMALL_QWEN2, ragged, write_model
from tests.gpu.first_hour_parts.report import Report
from tests.gpu.first_hour_parts.waits import Waits

WAITS_A_MICRO_BATCH = 2  # as in tests/gpu_pretended
STOPPED = 75
STEPS = 4
OTHER_CHARACTERS = (*range(0x4E00, 0x9FFF), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))


def even(prompt: str, response: str, record: dict[str, Any]) -> float:
    """Reward characters of even number: responses of a model that knows nothing get different rewards."""
    return sum(ord(character) % 2 == 0 for character in response) / max(1, len(response)) + record["bonus"]


def write_inputs(folder: Path, *, small: bool) -> dict[str, dict[str, Any]]:
    """Write model, tokenizer and data; return the configurations of the jobs by name."""
    from tests.support.tiny_jobs import CHARACTERS, write_lines, write_tokenizer

    sizes = SMALL_QWEN2 if small else QWEN2
    model = write_model(folder / "model", "qwen2", sizes, std=0.2 if small else 0.02)
    more = sizes["vocab_size"] - 4 - len(CHARACTERS)  # a token of the tokenizer for every row of the model
    write_tokenizer(model, characters=CHARACTERS + "".join(map(chr, OTHER_CHARACTERS[: max(0, more)])))
    longest, count = (40, 12) if small else (600, 64)
    records = [
        {"prompt_ids": list(each.prompt_ids), "response_ids": list(each.response.ids)}
        for each in ragged(count, longest, sizes["vocab_size"])
    ]
    prompts = [{"prompt": f"{number}+{number % 3}=", "bonus": number / 7} for number in range(16)]
    write_lines(folder / "data.jsonl", records)
    write_lines(folder / "prompts.jsonl", prompts)
    base = {"model": {"path": str(model)}, "optimizer": {"lr": 1e-4}}
    limits = {"max_length": 2 * longest, "tokens_per_micro_batch": 3 * longest}
    sft = {
        **base,
        "data": {"path": str(folder / "data.jsonl"), "groups_per_step": count // 4, **limits},
        "loss": {"name": "sft"},
        "checkpoint": {"every": 2, "keep": 1},
    }
    rollout = {
        "path": str(folder / "prompts.jsonl"), "rounds": 2, "prompts_per_round": 4 if small else 8, "k": 4,
        "max_new_tokens": 6 if small else 64, "updates_per_round": 2, "reward": f"{__name__}:even",
    }  # fmt: skip
    rounds = {**base, "data": limits, "loss": {"name": "gvpo"}, "rollout": rollout}
    return {"sft": sft, "resumed": sft, "rounds": rounds}


def train(folder: Path, name: str, sections: dict[str, Any], *overrides: str) -> int:
    """Run `megalign train` in this process and return its exit code."""
    from megalign.__main__ import main

    place = folder / name
    place.mkdir(exist_ok=True)
    steps = {} if "rollout" in sections else {"steps": STEPS}
    run = {"dir": str(place / "run"), "dtype": "bf16", **steps}
    config = {**sections, "run": run, "export": {"hf_dir": str(place / "exported")}}
    (place / "job.yaml").write_text(yaml.safe_dump(config))
    try:
        return main(["train", str(place / "job.yaml"), *overrides])
    finally:
        gc.collect()  # ends the job's process groups


def job(report: Report) -> None:
    """Train whole, stopped and resumed, and in rounds; compare, reload the exports, and count the waits."""
    from tests.support.tiny_jobs import NOW

    counted = Waits()
    try:
        counted.start()
    except (AttributeError, RuntimeError) as error:
        report.skip("host waits", f"torch has no sync debug mode here: {error}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = write_inputs(folder, small=report.small)
        for job_name, sections in jobs.items():
            overrides, codes = ([[NOW], []], [STOPPED, 0]) if job_name == "resumed" else ([[]], [0])
            found = [train(folder, job_name, sections, *each) for each in overrides]
            report.check(f"{job_name}: exit codes", found == codes, expected=str(codes), found=found)
            if found == codes:
                check_run(report, folder / job_name, job_name)
            shutil.rmtree(folder / job_name / "run" / "checkpoints", ignore_errors=True)  # gigabytes
        compare(report, folder)
    if counted.micro_batches:
        check_waits(report, counted)


def steps_of(place: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that belong to steps."""
    from tests.support.tiny_jobs import metrics

    path = place / "run"
    return [line for line in metrics(path) if line["step"]] if (path / "metrics.jsonl").exists() else []


def check_run(report: Report, place: Path, name: str) -> None:
    """Check steps, losses and pass gaps of a run, and that transformers loads its export."""
    import transformers

    lines = steps_of(place)
    numbers = [line["step"] for line in lines]
    report.check(f"{name}: steps", numbers == list(range(1, STEPS + 1)), expected=f"1 to {STEPS}", found=numbers)
    losses = [round(line["loss"], 4) for line in lines]
    report.check(f"{name}: losses", all(map(math.isfinite, losses)), expected="finite", found=losses)
    gaps = [line["pass_gap"] for line in lines if line.get("pass_gap") is not None]
    if gaps:
        report.within(f"{name}: largest pass_gap", max(gaps), 0.0)
    speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
    report.figure(f"{name}: tokens/s of the last step", round(speeds[-1]) if speeds else None)
    with torch.device("cpu"):
        model = transformers.AutoModelForCausalLM.from_pretrained(place / "exported", dtype=torch.float32)
    finite = all(bool(each.isfinite().all()) for each in model.parameters())
    report.check(f"{name}: export loads", finite, expected="finite weights", found="finite" if finite else "not finite")


def compare(report: Report, folder: Path) -> None:
    """Check that a job that was stopped and went on has the losses of one that was not."""
    whole, resumed = (steps_of(folder / name) for name in ("sft", "resumed"))
    gaps = [abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(whole, resumed, strict=False)]
    report.within("resumed: losses off those of the whole job by", max(gaps, default=math.nan), 5e-3)


def check_waits(report: Report, counted: Waits) -> None:
    """Hold the budget of host waits in the passes over micro-batches."""
    total = sum(counted.inside.values()) / counted.micro_batches
    report.within("host waits a pass over a micro-batch", total, WAITS_A_MICRO_BATCH)
    for line, number in counted.inside.most_common(8):
        report.figure(f"waits a pass at {line}", round(number / counted.micro_batches, 2))
    for line, number in counted.outside.most_common(8):
        report.figure(f"waits elsewhere at {line}", number)
