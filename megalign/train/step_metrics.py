"""Describes a finished step: its line of metrics, and the sequences it trained on."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import torch

from megalign.engines.protocol import Engine
from megalign.engines.step import StepBatch, StepResult
from megalign.files import write_whole


def step_metrics(
    engine: Engine, batch: StepBatch, result: StepResult, *, rate: float, norm: float, seconds: float
) -> dict[str, Any]:
    """Collect the metrics of a step's global batch, the same on every rank except for times."""
    tokens = sum(len(sequence) for sequence in batch.sequences)
    return {
        "loss": result.loss,
        "grad_norm": norm,
        "lr": rate,
        "tokens": tokens,
        "sequences": len(batch.sequences),
        "groups": batch.num_groups,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "padding_fraction": result.padding_fraction,
        "pass_mode": result.pass_mode,
        "pass_gap": result.pass_gap,
        "peak_memory_gb": engine.max_over_job(_peak_memory_gb(engine.device)),
        **result.metrics,
    }


def _peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory in 1e9 bytes: the device's on CUDA, else this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def dump_step(run_dir: Path, step: int, batch: StepBatch, result: StepResult) -> None:
    """Write `steps/step_<n>.jsonl`: one line a sequence that the step trained on."""
    folder = run_dir / "steps"
    folder.mkdir(exist_ok=True)
    lines = []
    for index, sequence in enumerate(batch.sequences):
        line = {
            "record": sequence.record,
            "group": sequence.group,
            "role": sequence.role,
            "prompt_ids": list(sequence.prompt_ids),
            "response_ids": list(sequence.response.ids),
            "logp": float(result.policy_S[index]),
            "reference_logp": None if batch.reference is None else batch.reference[index].total,
            "coefficient": float(result.coefficient_S[index]),
        }
        lines.append(json.dumps(line) + "\n")
    write_whole(folder / f"step_{step}.jsonl", "".join(lines))
