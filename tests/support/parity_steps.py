"""Run the steps of `parity_cases` through an engine in one process of a job, and keep the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.data.packing import Packing
from megalign.engines.protocol import Want
from megalign.engines.scoring import Scored, score
from megalign.engines.step import StepBatch, StepResult, accumulate, evaluate
from megalign.losses import choose_loss
from megalign.model_config import Lora
from megalign.runtime.distributed import World
from tests.support.loss_cases import LOSSES
from tests.support.parity_cases import (
    ADAM_STEPS,
    ADAPTER_LR,
    ADAPTERS,
    CUTTINGS,
    EXTREMES,
    FEW_ADAPTERS,
    LARGE,
    LR,
    SMALL,
    Case,
    step_sequences,
)


class StepRuns:
    """The parts that every engine has, each a dictionary of plain values and tensors; `engine` makes the engine."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        self.known = torch.load(folder / "known.pt")

    def engine(self, model: str, *, checkpoint: str = "policy", trains: bool = True, **options: Any) -> Any:
        """An engine with a checkpoint's weights."""
        raise NotImplementedError

    def draw_adapters(self, engine: Any) -> None:
        """Set an engine's adapters to the values of `lora_answers.drawn`."""
        raise NotImplementedError

    def batch(self, model: str, loss: str) -> StepBatch:
        """The step's sequences with the reference's and old policy's scores as far as the loss wants them."""
        raw, kind = LOSSES[loss]
        sequences, traits = step_sequences(kind), choose_loss(raw).traits()

        def scored(checkpoint: str) -> list[Scored]:
            return [Scored(float(logp.sum()), logp.float()) for logp in self.known[f"{model} {kind} {checkpoint}"]]

        return StepBatch(
            sequences,
            1 + sequences[-1].group,
            reference=scored("reference") if traits.reference else None,
            old=scored("old") if traits.old else None,
        )

    def step(self, engine: Any, case: Case, **changes: Any) -> StepResult:
        """One step's gradients by `engines.step.accumulate`."""
        mode = changes.pop("mode", None)
        batch = replace(self.batch(case.model, case.loss), **changes)
        packing = Packing(case.budget, pack=case.packing)
        return accumulate(engine, batch, choose_loss(LOSSES[case.loss][0]), packing=packing, mode=mode)

    def tensors(self, engine: Any, kind: str) -> dict[str, Tensor]:
        """Whole tensors in Hugging Face names, copied."""
        return {name: tensor.clone() for name, tensor in engine.hf_tensors(kind)}

    def agreed(self, result: StepResult) -> dict[str, Any]:
        """The result, and whether every rank has the same."""
        plain = {
            "loss": result.loss,
            "metrics": dict(result.metrics),
            "policy_S": result.policy_S.tolist(),
            "coefficient_S": result.coefficient_S.tolist(),
            "pass_mode": result.pass_mode,
            "pass_gap": result.pass_gap,
            "padding_fraction": result.padding_fraction,
        }
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, repr(plain))
        return {**plain, "same_on_all_ranks": len(set(everyone)) == 1}

    def parity(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Loss, gradients and gradient norm of every case; those of one model come together."""
        results, engine, loaded = {}, None, None
        for case in cases:
            if case.model != loaded:
                engine, loaded = self.engine(case.model), case.model
            assert engine is not None
            results[case.key] = self.agreed(self.step(engine, case))
            if case.gradients:
                results[case.key]["gradients"] = self.tensors(engine, "grad")
            results[case.key]["grad_norm"] = engine.update(0.0)
        return results

    def trajectory(self, model: str, loss: str, **options: Any) -> dict[str, Any]:
        """Take AdamW steps on one batch, packed differently in each."""
        engine, steps = self.engine(model, **options), []
        for number in range(ADAM_STEPS):
            result = self.step(engine, Case(model, loss, *CUTTINGS[number]))
            steps.append((result.loss, engine.update(LR)))
        return {"steps": steps, "weights": self.tensors(engine, "weight"), "heads": self.heads_of(engine)}

    def heads_of(self, engine: Any) -> dict[str, Tensor]:
        """Heads that an engine keeps apart from what it exports."""
        return {}

    def modes(self, losses: Sequence[str]) -> dict[str, Any]:
        """Each loss in each pass mode that is exact for it."""
        results, engine = {}, self.engine("llama")
        for loss in losses:
            sequences, coupled = self.batch("llama", loss).sequences, choose_loss(LOSSES[loss][0]).traits().coupled
            for budget, packing in EXTREMES:
                case = Case("llama", loss, budget, packing)
                current = score(
                    engine,
                    sequences,
                    coupled=coupled,
                    packing=Packing(budget, pack=packing),
                    want=Want(entropy=True, accuracy=True, by_token=True),
                )
                runs: dict[str, Any] = {"two_pass": {"mode": "two_pass"}, "known_scores": {"current": current}}
                if not coupled or budget == LARGE:
                    runs["single_pass"] = {"mode": "single_pass"}
                if choose_loss(LOSSES[loss][0]).traits().old:
                    fresh = {"old": None, "on_policy": True}
                    runs["old_given"] = {"old": current, "mode": "two_pass"}
                    runs["on_policy two_pass"] = {**fresh, "mode": "two_pass"}
                    runs["on_policy known_scores"] = {**fresh, "current": current}
                    runs["on_policy cheapest"] = fresh
                for mode, changes in runs.items():
                    result = self.agreed(self.step(engine, case, **changes))
                    results[f"{case.key} {mode}"] = {**result, "gradients": self.tensors(engine, "grad")}
        return results

    def scores(self) -> dict[str, Any]:
        """Scores of an engine that cannot train, and the value of each loss without a gradient."""
        results, engine = {}, self.engine("llama", trains=False)
        for loss, (raw, kind) in LOSSES.items():
            batch, packing = self.batch("llama", loss), Packing(SMALL)
            coupled = choose_loss(raw).traits().coupled
            results[loss] = self.agreed(evaluate(engine, batch, choose_loss(raw), packing=packing))
            by_token = score(engine, batch.sequences, coupled=coupled, packing=packing, want=Want(by_token=True))
            totals = score(engine, batch.sequences, coupled=coupled, packing=packing)
            results[kind] = {
                "by_token": [(one.total, one.logp_N, one.lse_N) for one in by_token],
                "totals": [(one.total, one.logp_N, one.lse_N) for one in totals],
            }
        return results

    def recompute(self, model: str) -> dict[str, Any]:
        """One step with each setting of recomputed layers."""
        results = {}
        for recompute in ("none", "selective", "full"):
            engine = self.engine(model, recompute=recompute)
            result = self.step(engine, Case(model, "gvpo", SMALL, packing=True))
            results[recompute] = {"loss": result.loss, "gradients": self.tensors(engine, "grad")}
        return results

    def adapted(self, model: str, lora: Lora = ADAPTERS, **options: Any) -> Any:
        """An engine with drawn adapters."""
        engine = self.engine(model, lora=lora, **options)
        self.draw_adapters(engine)
        return engine

    def lora(self, model: str, ways: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Adapters as they begin, switched off, and trained; with each way's options too."""
        case, plain = Case(model, "gvpo", SMALL, packing=True), self.engine(model)
        sequences, packing = self.batch(model, "gvpo").sequences, Packing(SMALL)
        results: dict[str, Any] = {"base": self.agreed(self.step(plain, case)), "steps": []}
        engine = self.engine(model, lora=FEW_ADAPTERS)
        results["begun"] = self.agreed(self.step(engine, case))
        results["few"] = {name: tensor.clone() for name, tensor in engine.adapter_tensors()}
        engine = self.adapted(model)
        scorers = (engine.base(), plain)
        off = [score(scorer, sequences, coupled=True, packing=packing, want=Want(by_token=True)) for scorer in scorers]
        results["off"] = all(torch.equal(mine.logp_N, theirs.logp_N) for mine, theirs in zip(*off, strict=True))
        results["shapes"] = {name: tensor.shape for name, tensor in engine.adapter_tensors()}
        for number in range(ADAM_STEPS):
            result = self.agreed(self.step(engine, Case(model, "gvpo", *CUTTINGS[number])))
            assert result["same_on_all_ranks"]
            if number == 0:
                results["gradients"] = {name: tensor.clone() for name, tensor in engine.adapter_tensors("grad")}
            results["steps"].append((result["loss"], engine.update(ADAPTER_LR)))
        results["adapters"] = {name: tensor.clone() for name, tensor in engine.adapter_tensors()}
        results["weights"] = self.tensors(engine, "weight")
        for name, options in ways.items():
            engine = self.adapted(model, **options)
            self.step(engine, Case(model, "gvpo", *CUTTINGS[0]))
            results[name] = {name: tensor.clone() for name, tensor in engine.adapter_tensors("grad")}
            engine.update(ADAPTER_LR)
            results[f"{name} next"] = self.step(engine, Case(model, "gvpo", *CUTTINGS[2])).loss
        return results
