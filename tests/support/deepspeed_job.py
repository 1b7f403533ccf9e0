"""Run the steps of `deepspeed_cases` through the DeepSpeed engine in one process of a job, and keep the results."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalign.config.job import JobConfig
from megalign.convert.hf.model import read_model
from megalign.data.packing import Packing, micro_batches
from megalign.engines.deepspeed import factory, weights
from megalign.engines.deepspeed.engine import DeepSpeedEngine
from megalign.engines.deepspeed.fragments import weights_changed
from megalign.engines.deepspeed.policy import is_partitioned
from megalign.engines.deepspeed.ranks import Ranks
from megalign.engines.export import export
from megalign.engines.head import Head
from megalign.engines.protocol import Want
from megalign.engines.scoring import score
from megalign.model_config import Lora
from megalign.runtime.distributed import World
from tests.support.deepspeed_cases import MODES, SETUPS, TRAJECTORIES, Setup, cases_of
from tests.support.lora_answers import drawn
from tests.support.parity_cases import ADAM_STEPS, CLIP, CUTTINGS, DECAY, EPS, LARGE, LR, SMALL, Case
from tests.support.parity_steps import StepRuns


def job_config(
    folder: Path, setup: Setup, *, dtype: torch.dtype = torch.float32, lora: Lora | None = None, recompute: str = "none"
) -> JobConfig:
    """The configuration of a job that trains a checkpoint in a set-up; what it says of data is not used."""
    zero = {"stage": setup.stage, "offload_optimizer": setup.optimizer, "offload_params": setup.params}
    sections: dict[str, Any] = {
        "run": {"dir": "unused", "steps": 1, "dtype": "bf16" if dtype == torch.bfloat16 else "fp32"},
        "model": {"path": str(folder)},
        "data": {"path": "unused", "max_length": 32, "groups_per_step": 1, "tokens_per_micro_batch": SMALL},
        "loss": {"name": "sft"},
        "optimizer": {"lr": LR, "eps": EPS, "weight_decay": DECAY, "clip_norm": CLIP},
        "engine": {"name": "deepspeed", "zero": zero, "recompute": recompute},
        "parallel": {"tensor": setup.tensor, "context": setup.context},
    }
    if setup.split:
        sections["engine"]["deepspeed_config"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    if lora is not None:
        sections["lora"] = {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)}
    return JobConfig.model_validate(sections)


def make_engine(cfg: JobConfig, world: World, *, trains: bool = True, ranks: Ranks | None = None) -> DeepSpeedEngine:
    """The engine that a configuration describes, with its model's weights."""
    path = Path(cfg.model.path)
    ranks = factory.connect(cfg, world) if ranks is None else ranks
    engine = factory.build(cfg, read_model(path), ranks, world, trainable=trains)
    engine.load_weights(path)
    return engine


def count_gathers(engine: DeepSpeedEngine, weight: Any) -> list[None]:
    """A list that gets an entry whenever a weight that this rank has in part is gathered, whoever asks for it."""
    calls: list[None] = []

    def counting(parameter: Any, name: str) -> Callable[..., Any]:
        gather = getattr(parameter, name)

        def gather_and_count(params: Any = None, **options: Any) -> Any:
            listed = [parameter] if params is None else [*params]
            absent = [one for one in listed if one is weight and one.ds_status.name == "NOT_AVAILABLE"]
            calls.extend([None] * len(absent))
            return gather(listed, **options)

        return gather_and_count

    for parameter in engine.policy.parameters():
        for name in ("all_gather", "all_gather_coalesced"):
            setattr(parameter, name, counting(parameter, name))
    return calls


class DeepSpeedJob(StepRuns):
    """The parts of one set-up."""

    def __init__(self, folder: Path, name: str, world: World, *, whole: bool = False) -> None:
        super().__init__(folder, world)
        self.setup, self.cases = SETUPS[name], cases_of(name, whole=whole)
        anything = job_config(folder, self.setup, dtype=torch.float32, lora=None, recompute="none")
        self.ranks = factory.connect(anything, world)

    def run(self) -> dict[str, Any]:
        """Every part that is asked for in this set-up."""
        results: dict[str, Any] = {
            "parity": self.parity(self.cases),
            "trajectory": {f"{model} {loss}": self.trajectory(model, loss) for model, loss in TRAJECTORIES},
            "skipped": self.skipped(torch.float32),
        }
        if self.setup.wide:
            results["modes"] = self.modes(MODES)
            results["recompute"] = self.recompute("llama")
            results["lora"] = self.lora("deep", {"full": {"recompute": "full"}})
            results["bf16"] = self.bf16()
            results["bf16 skipped"] = self.skipped(torch.bfloat16)
            results["bf16 not skipped"] = self.trajectory("llama-tied", "gvpo", dtype=torch.bfloat16)
            results["uneven"] = self.uneven()
        if self.setup.stage == 3:
            results["score"] = self.scores()
        if self.setup.split:
            results["gathers"] = {model: self.gathers(model) for model in ("llama", "llama-tied")}
        return results

    def engine(
        self,
        model: str,
        *,
        checkpoint: str | Path = "policy",
        trains: bool = True,
        dtype: torch.dtype = torch.float32,
        lora: Lora | None = None,
        recompute: str = "none",
    ) -> DeepSpeedEngine:
        """A DeepSpeed engine with a checkpoint's weights."""
        path = self.folder / model / checkpoint
        cfg = job_config(path, self.setup, dtype=dtype, lora=lora, recompute=recompute)
        return make_engine(cfg, self.world, trains=trains, ranks=self.ranks)

    def draw_adapters(self, engine: DeepSpeedEngine) -> None:
        """Set an engine's adapters to the values of `lora_answers.drawn`."""
        values = {
            name: drawn(name.replace(".default", ""), torch.Size(spec.shape))
            for name, spec in engine.weights.specs().items()
        }
        for parameter in engine.weights.trained:
            weights.assign(parameter, engine.weights.part(parameter, values.__getitem__))
        weights_changed(engine.ds)

    def skipped(self, dtype: torch.dtype) -> dict[str, Any]:
        """Steps with a norm that is not finite, before and between others, and one with rate 0 at the end."""
        engine = self.engine("llama-tied", dtype=dtype)
        before, steps, norms = self.tensors(engine, "weight"), [], []
        for number in range(ADAM_STEPS):
            norms.append(self.infinite(engine))
            held = self.tensors(engine, "weight")
            result = self.step(engine, Case("llama-tied", "gvpo", *CUTTINGS[number]))
            same = all(torch.equal(held[name], before[name]) for name in before)
            steps.append((result.loss, engine.update(LR), same))
            before = self.tensors(engine, "weight")
        self.step(engine, Case("llama-tied", "gvpo", *CUTTINGS[0]))
        engine.update(0.0)
        after = self.tensors(engine, "weight")
        still = all(torch.equal(after[name], before[name]) for name in before)
        return {"steps": steps, "norms": norms, "weights": after, "rate 0 moves nothing": still}

    def infinite(self, engine: DeepSpeedEngine) -> float:
        """The norm that `update` returns where a coefficient of one micro-batch is infinite."""
        sequences = self.batch("llama", "gvpo").sequences
        batches = micro_batches(engine.shape, sequences, coupled=True, packing=Packing(SMALL)).batches
        last = len(batches) - 1

        def objective(index: int, head: Head) -> tuple[Tensor, None]:
            factor = math.inf if index == last and engine.ranks.rank == 0 else 1.0
            return factor * head.logp().logp_N.sum(), None

        engine.backward(batches, objective)
        return engine.update(LR)

    def uneven(self) -> dict[str, Any]:
        """Scores and steps of changing numbers of micro-batches in turn; a fresh engine scores the export like it."""
        engine, packing = self.engine("llama"), Packing(SMALL)
        steps, scores = [], []
        for loss, budget in (("gvpo", SMALL), ("sft", LARGE), ("gvpo", 1), ("gvpo", LARGE), ("dapo", SMALL)):
            sequences = self.batch("llama", loss).sequences
            score(engine, sequences, coupled=False, packing=packing)
            batches = micro_batches(engine.shape, sequences, coupled=False, packing=Packing(budget)).batches
            result = self.step(engine, Case("llama", loss, budget, packing=True))
            steps.append((len(batches), result.loss, engine.update(LR)))
            scores.append([one.total for one in score(engine, sequences, coupled=False, packing=packing)])
        sequences = self.batch("llama", "dapo").sequences
        by_token = Want(by_token=True)
        mine = score(engine, sequences, coupled=False, packing=packing, want=by_token)
        exported = self.folder / "llama" / f"exported {self.setup}"
        export(engine, read_model(self.folder / "llama" / "policy"), exported)
        fresh = self.engine("llama", checkpoint=exported, trains=False)
        theirs = score(fresh, sequences, coupled=False, packing=packing, want=by_token)
        in_part = [one for one in fresh.policy.parameters() if is_partitioned(one) and one.numel() == 0]
        gap = max(float((a.logp_N - b.logp_N).abs().max()) for a, b in zip(mine, theirs, strict=True))
        partitioned = len(in_part) / len([*fresh.policy.parameters()])
        last = [one.total for one in mine]
        return {"steps": steps, "scores": scores, "last": last, "gap": gap, "partitioned": partitioned}

    def gathers(self, model: str) -> dict[str, tuple[int, int]]:
        """How many micro-batches a pass had, and how often it gathered the head's weight for them."""
        engine, packing = self.engine(model), Packing(SMALL)
        calls = count_gathers(engine, engine.policy.head_parameters[0])
        sequences, found = self.batch(model, "gvpo").sequences, {}
        batches = micro_batches(engine.shape, sequences, coupled=True, packing=packing).batches
        for name in ("first", "second"):  # DeepSpeed prefetches by the order of the first
            calls.clear()
            engine.forward(batches)
            found[f"{name} scores"] = (len(batches), len(calls))
            calls.clear()
            engine.backward(batches, lambda index, head: (head.logp().logp_N.sum(), None))
            found[f"{name} gradient"] = (len(batches), len(calls))
            engine.update(0.0)
        return found

    def bf16(self) -> dict[str, Any]:
        """One GVPO loss and its gradient, then ten steps of which each is far below what a bf16 weight can resolve."""
        engine = self.engine("llama", dtype=torch.bfloat16)
        losses, norms, weights = [], [], [self.tensors(engine, "weight")]
        gradients: dict[str, Tensor] = {}
        for _ in range(10):
            losses.append(self.step(engine, Case("llama", "gvpo", LARGE, packing=True)).loss)
            gradients = gradients or self.tensors(engine, "grad")
            norms.append(engine.update(1e-4))
            weights.append(self.tensors(engine, "weight"))
        found = {"before": weights[0], "first": weights[1], "last": weights[-1]}
        return {"losses": losses, "norms": norms, "gradients": gradients, **found}
