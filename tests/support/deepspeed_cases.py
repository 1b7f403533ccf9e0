"""Set-ups of the DeepSpeed engine on which parity is tested, and the job that runs those of one number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.support.loss_cases import LOSSES
from tests.support.parity_cases import ALONE, CUTTINGS, EXTREMES, FAMILIES, Case
from tests.support.parity_layouts import EXPERTS


@dataclass(frozen=True)
class Setup:
    """Ranks, ZeRO stage, and what is kept in CPU memory.

    `wide`: all losses and all that must not matter. `split`: stage 3 partitions small parameters too, which by default
    it gathers once a step. `tensor`: how many of the ranks have parts of one model; `context`: of one row.
    """

    ranks: int
    stage: int
    optimizer: bool = False
    params: bool = False
    wide: bool = False
    split: bool = False
    tensor: int = 1
    context: int = 1


SETUPS = {
    "zero2 x 2": Setup(2, 2, wide=True),
    "zero3 x 2": Setup(2, 3, wide=True, split=True),
    "zero1 x 2": Setup(2, 1),
    "zero2 offloaded x 2": Setup(2, 2, optimizer=True),
    "zero3 offloaded x 2": Setup(2, 3, optimizer=True, params=True),
    "zero2 x 1": Setup(1, 2),
    "zero3 x 1": Setup(1, 3),
    "zero1 x 4": Setup(4, 1),
    "zero3 x 4": Setup(4, 3, split=True),
    "zero2 offloaded x tensor 2": Setup(2, 2, optimizer=True, tensor=2),
    "zero3 x tensor 2": Setup(2, 3, split=True, tensor=2),
    "zero2 x context 2": Setup(2, 2, context=2),
    "zero3 x context 2": Setup(2, 3, split=True, context=2),
    "zero1 x 2 x tensor 2": Setup(4, 1, tensor=2),
    "zero3 offloaded x 2 x tensor 2": Setup(4, 3, optimizer=True, params=True, split=True, tensor=2),
    "zero1 x 1": Setup(1, 1),
    "zero2 x 4": Setup(4, 2),
    "zero1 offloaded x 2": Setup(2, 1, optimizer=True),
    "zero3 offloaded optimizer x 2": Setup(2, 3, optimizer=True),
    "zero3 offloaded weights x 2": Setup(2, 3, params=True, split=True),
    "zero2 offloaded x 4": Setup(4, 2, optimizer=True),
    "zero3 offloaded x 4": Setup(4, 3, optimizer=True, params=True),
    "zero1 x tensor 2": Setup(2, 1, tensor=2),
    "zero2 x 2 x tensor 2": Setup(4, 2, tensor=2),
    "zero3 x 2 x tensor 2": Setup(4, 3, tensor=2),
    "zero1 x context 2": Setup(2, 1, context=2),
    "zero1 x 2 x context 2": Setup(4, 1, context=2),
    "zero2 x 2 x context 2": Setup(4, 2, context=2),
    "zero3 x context 4": Setup(4, 3, split=True, context=4),
}
DEFAULT = (
    "zero2 x 2",
    "zero3 x 2",
    "zero2 offloaded x 2",
    "zero3 offloaded x 2",
    "zero2 x 1",
    "zero3 x 1",
    "zero1 x 4",
    "zero3 x tensor 2",
    "zero3 x context 2",
    "zero3 offloaded x 2 x tensor 2",
)
WIDE = tuple(name for name, setup in SETUPS.items() if setup.wide)
MODES = ("sft", "dapo", "rloo", "gvpo")  # losses of the runs in every pass mode
OTHER_MODELS = {
    "zero2 x 2": FAMILIES,
    "zero3 x 2": ("qwen2", *EXPERTS),
    "zero3 x tensor 2": ("deep", *FAMILIES),
}  # beside a Llama, tied or not
TRAJECTORIES = (("llama", "epa"), ("llama-tied", "gvpo"))


def cases_of(name: str, *, whole: bool) -> list[Case]:
    """The steps of a set-up, grouped by model; `whole`: every loss in every cutting."""
    losses: Sequence[str] = tuple(LOSSES) if whole or SETUPS[name].wide else ("sft", "dapo", "gvpo")
    cuttings = CUTTINGS if whole else EXTREMES
    cases = [Case("llama", loss, *cut, gradients=loss in ("gvpo", "epa")) for loss in losses for cut in cuttings]
    # Two ranks of seven sequences, one a micro-batch, need a dummy; so do four ranks of any step.
    cases += [Case("llama", loss, *ALONE, gradients=True) for loss in ("sft", "gvpo")]
    cases += [Case("llama-tied", loss, *cut, gradients=True) for loss in ("sft", "gvpo") for cut in cuttings]
    models: Sequence[str] = (*FAMILIES, *EXPERTS) if whole else OTHER_MODELS.get(name, ())
    if SETUPS[name].tensor > 1:
        models = [model for model in models if model not in EXPERTS]
    return [*cases, *(Case(model, "gvpo", *EXTREMES[0], gradients=True) for model in models)]


def run_world(folder: Path, names: Sequence[str], whole: bool) -> None:
    """The job: every part of every named set-up; rank 0 leaves what came out in a file a set-up."""
    from megalign.runtime.distributed import process_group

    with process_group(timeout_s=300) as world:
        from tests.support.deepspeed_job import DeepSpeedJob

        for name in names:
            results = DeepSpeedJob(folder, name, world, whole=whole).run()
            if world.is_main:
                torch.save(results, result_path(folder, name, whole=whole))


def result_path(folder: Path, name: str, *, whole: bool) -> Path:
    """The file of a set-up's results."""
    return folder / f"{name}{' whole' if whole else ''}.pt"
