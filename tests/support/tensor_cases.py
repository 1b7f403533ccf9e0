"""Jobs of the DeepSpeed engine with tensor ranks: what is run on them, and what rank 0 leaves of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.support.engine_saves import complete
from tests.support.parity_cases import ADAM_STEPS, CLIP, CUTTINGS, DECAY, EPS, LR, SMALL, step_sequences

STAGES = (1, 2, 3)


@dataclass(frozen=True)
class TensorSetup:
    """A layout and a ZeRO stage."""

    tensor: int
    data: int
    stage: int

    @property
    def name(self) -> str:
        """The set-up in words."""
        return f"tp{self.tensor}xdp{self.data} zero{self.stage}"


NOTHING: dict[str, list[Tensor]] = {"reference": [], "old": []}  # an SFT loss needs no scores
SETUPS = [TensorSetup(2, data, stage) for data in (1, 2) for stage in STAGES]


def config(path: Path, setup: TensorSetup, **sections: Any) -> Any:
    """The configuration of a job that trains a checkpoint; what it says of data is not used."""
    from megalign.config.job import JobConfig

    plain: dict[str, Any] = {
        "run": {"dir": "unused", "steps": 1, "dtype": "fp32"},
        "model": {"path": str(path)},
        "data": {"path": "unused", "max_length": 32, "groups_per_step": 1, "tokens_per_micro_batch": SMALL},
        "loss": {"name": "sft"},
        "optimizer": {"lr": LR, "eps": EPS, "weight_decay": DECAY, "clip_norm": CLIP},
        "engine": {"name": "deepspeed", "zero": {"stage": setup.stage}},
        "parallel": {"tensor": setup.tensor},
    }
    if setup.stage == 3:  # small parameters are partitioned too
        plain["engine"]["deepspeed_config"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    for name, values in sections.items():
        plain[name] = {**plain.get(name, {}), **values}
    return JobConfig.model_validate(plain)


class TensorJob:
    """The runs of one set-up."""

    def __init__(self, folder: Path, setup: TensorSetup, world: Any) -> None:
        from megalign.engines.deepspeed import factory

        self.folder, self.setup, self.world = folder, setup, world
        self.ranks = factory.connect(config(folder, setup), world)

    def engine(self, path: Path, *, trains: bool = True, **sections: Any) -> Any:
        """An engine with a checkpoint's weights."""
        from megalign.convert.hf.model import read_model
        from megalign.engines.deepspeed import factory

        cfg = config(path, self.setup, **sections)
        engine = factory.build(cfg, read_model(path), self.ranks, self.world, trainable=trains)
        engine.load_weights(path)
        return engine

    def step(self, engine: Any, loss: str, known: dict[str, list[Tensor]], cutting: tuple[int, bool]) -> Any:
        """One step's gradients; known: {checkpoint: log-probs by token of each sequence}."""
        from megalign.data.packing import Packing
        from megalign.engines.scoring import Scored
        from megalign.engines.step import StepBatch, accumulate
        from megalign.losses import choose_loss
        from tests.support.loss_cases import LOSSES

        raw, kind = LOSSES[loss]
        sequences, traits = step_sequences(kind), choose_loss(raw).traits()
        scored = {name: [Scored(float(one.sum()), one.float()) for one in each] for name, each in known.items()}
        batch = StepBatch(
            sequences,
            1 + sequences[-1].group,
            reference=scored["reference"] if traits.reference else None,
            old=scored["old"] if traits.old else None,
        )
        return accumulate(engine, batch, choose_loss(raw), packing=Packing(cutting[0], pack=cutting[1]))

    def whole(self, engine: Any, kind: str) -> dict[str, Tensor]:
        """Whole tensors in Hugging Face names, copied."""
        return {name: tensor.clone() for name, tensor in engine.hf_tensors(kind)}

    def auto(self, name: str) -> dict[str, Any]:
        """AdamW steps of an SFT loss and the gradients of the first."""
        engine, steps = self.engine(self.folder / name), []
        gradients: dict[str, Tensor] = {}
        for number in range(ADAM_STEPS):
            loss = self.step(engine, "sft", NOTHING, CUTTINGS[number]).loss
            gradients = gradients or self.whole(engine, "grad")
            steps.append((loss, engine.update(LR)))
        return {"gradients": gradients, "steps": steps, "weights": self.whole(engine, "weight"), "note": engine.note}

    def go_on(
        self, engine: Any, loss: str, known: dict[str, list[Tensor]], numbers: Sequence[int]
    ) -> list[tuple[float, float]]:
        """(loss, norm) of AdamW steps."""
        return [(self.step(engine, loss, known, CUTTINGS[number]).loss, engine.update(LR)) for number in numbers]


def auto_answer(folder: Path) -> dict[str, Any]:
    """The float64 answers of an SFT step of a family that the tables lack, and of AdamW steps."""
    from tests.support.loss_cases import LOSSES
    from tests.support.oracle import SlowAdamW, scored_rows, slow_loss, token_scores

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double().eval()
    raw, kind = LOSSES["sft"]
    parameters = dict(model.named_parameters())
    adamw, steps, first = SlowAdamW(parameters, eps=EPS, weight_decay=DECAY), [], {}
    for _ in range(ADAM_STEPS):
        policy = [token_scores(scored_rows(model, sequence))[0] for sequence in step_sequences(kind)]
        value = slow_loss(raw, step_sequences(kind), policy, [], [])
        gradient = dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))
        first = first or {name: each.clone() for name, each in gradient.items()}
        steps.append((float(value.detach()), adamw.step(gradient, lr=LR, clip_norm=CLIP)))
    return {"gradients": first, "steps": steps, "weights": {name: each.detach() for name, each in parameters.items()}}


def run_auto(folder: Path, setups: Sequence[TensorSetup], names: Sequence[str]) -> None:
    """Run AdamW steps of families that the tables lack; rank 0 leaves the results."""
    from megalign.runtime.distributed import process_group

    with process_group(timeout_s=120) as world:
        results = {}
        for setup in setups:
            job = TensorJob(folder, setup, world)
            results |= {(setup, name): job.auto(name) for name in names}
        if world.is_main:
            torch.save(results, folder / f"auto {world.size}.pt")


def run_resumed(folder: Path, setup: TensorSetup, models: Sequence[tuple[str, str | None]], number: int) -> None:
    """Take a step of each (model, adapters' layers) from what the step before saved, and save; rank 0 keeps tensors."""
    from megalign.runtime.distributed import process_group

    with process_group(timeout_s=120) as world:
        job = TensorJob(folder, setup, world)
        for model, targets in models:
            lora = {"lora": {"rank": 4, "alpha": 8.0, "targets": targets.split()}} if targets else {}
            engine, saved = job.engine(folder / model, **lora), folder / model.replace("/", " ")
            earlier = engine.load(saved / f"{number - 1}")["steps"] if number else []
            steps = [*earlier, *job.go_on(engine, "sft", NOTHING, [number])]
            if world.is_main:
                (saved / f"{number}").mkdir(parents=True)
            torch.distributed.barrier()
            complete(engine.begin_save(saved / f"{number}", {"steps": steps}, copied=False))
            tensors = {**job.whole(engine, "weight"), **{name: one.clone() for name, one in engine.adapter_tensors()}}
            if world.is_main:
                torch.save({"steps": steps, "tensors": tensors}, saved / f"{number}.pt")


def run_whole(folder: Path, models: Sequence[tuple[str, str | None]]) -> None:
    """Take the three steps of each model without a checkpoint, on one rank."""
    from megalign.runtime.distributed import process_group

    with process_group(timeout_s=120) as world:
        job = TensorJob(folder, TensorSetup(1, 1, 1), world)
        for model, targets in models:
            lora = {"lora": {"rank": 4, "alpha": 8.0, "targets": targets.split()}} if targets else {}
            engine = job.engine(folder / model, **lora)
            steps = job.go_on(engine, "sft", NOTHING, range(ADAM_STEPS))
            tensors = {**job.whole(engine, "weight"), **{name: one.clone() for name, one in engine.adapter_tensors()}}
            torch.save({"steps": steps, "tensors": tensors}, folder / f"{model.replace('/', ' ')} whole.pt")
