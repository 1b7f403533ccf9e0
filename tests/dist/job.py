"""What one process does for a layout: the steps of `cases` through the Megatron engine, and what came out of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import (
    ADAM_STEPS,
    ADAPTER_LR,
    ADAPTERS,
    AUX,
    CLIP,
    CUTTINGS,
    DECAY,
    EPS,
    EXPERTS,
    EXTREMES,
    FEW_ADAPTERS,
    HEAD_WAYS,
    HEADS,
    LARGE,
    LORA,
    LOSSES,
    LR,
    MODES,
    OVERLAP_BOTH,
    OVERLAPPED,
    RECOMPUTED,
    REPEATED,
    SMALL,
    Case,
    Layout,
    parity_cases,
    step_sequences,
    trajectories,
)
from lora_answers import draw_adapters
from torch import Tensor

from megalign.convert import hf_state, read_model_config
from megalign.engines.groups import make_groups
from megalign.engines.megatron import AdamW, EngineOptions, MegatronEngine
from megalign.engines.scoring import Cutting, Scored, score
from megalign.engines.step import StepBatch, StepResult, accumulate, evaluate
from megalign.losses import choose_loss
from megalign.models.lora import Lora
from megalign.runtime.distributed import World


class Job:
    """The parts of one layout, each a dictionary of plain values and tensors."""

    def __init__(self, folder: Path, name: str, layout: Layout, world: World) -> None:
        self.folder, self.name, self.layout, self.world = folder, name, layout, world
        self.groups = make_groups(
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            virtual=layout.virtual,
            context=layout.context,
            expert=layout.expert,
            timeout_s=120,
        )
        self.known = torch.load(folder / "known.pt")

    def run(self) -> dict[str, Any]:
        results: dict[str, Any] = {
            "parity": self.parity(),
            "trajectory": {f"{model} {loss}": self.trajectory(model, loss) for model, loss in trajectories(self.name)},
        }
        if self.name in MODES:
            results["modes"] = self.modes()
        if self.name in ("one", "tp2xpp2", "dp2"):
            results["score"] = self.scores()
        if self.name in RECOMPUTED:
            results["recompute"] = self.recompute(RECOMPUTED[self.name])
        if self.name in OVERLAPPED:
            results["overlap"] = self.trajectory(OVERLAPPED[self.name], "gvpo", **OVERLAP_BOTH)
        if self.name in REPEATED:
            results["repeated"] = self.repeated(REPEATED[self.name])
        if self.name in LORA:
            results["lora"] = self.lora(LORA[self.name])
        if self.name == "tp2":
            results["bf16"] = self.bf16()
            results["bf16 lora"] = self.bf16_lora()
        if self.name in HEADS:
            results["heads"] = self.heads()
        return results

    def engine(
        self,
        model: str,
        *,
        checkpoint: str = "policy",
        trains: bool = True,
        fields: dict[str, Any] | None = None,
        **options: Any,
    ) -> MegatronEngine:
        path = self.folder / model / checkpoint
        options = {"dtype": torch.float32, "device": self.world.device, **options}
        options |= {"aux_loss_coefficient": AUX if model in EXPERTS else 0.0}
        engine = MegatronEngine(
            replace(read_model_config(path), **(fields or {})),
            self.groups,
            EngineOptions(sequence_parallel=self.layout.sequence, **options),
            adamw=AdamW(eps=EPS, weight_decay=DECAY) if trains else None,
        )
        engine.load_weights(path)
        return engine

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

    def step(self, engine: MegatronEngine, case: Case, **changes: Any) -> StepResult:
        mode = changes.pop("mode", None)
        batch = replace(self.batch(case.model, case.loss), **changes)
        cutting = Cutting(case.budget, packing=case.packing)
        return accumulate(engine, batch, choose_loss(LOSSES[case.loss][0]), cutting=cutting, mode=mode)

    def tensors(self, engine: MegatronEngine, kind: str) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in hf_state(engine.model, engine.full_tensors(kind))}

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

    def parity(self) -> dict[str, Any]:
        results, engine, loaded = {}, None, None
        for case in parity_cases(self.name):
            if case.model != loaded:
                engine, loaded = self.engine(case.model), case.model
            assert engine is not None
            results[case.key] = self.agreed(self.step(engine, case))
            if case.gradients:
                results[case.key]["gradients"] = self.tensors(engine, "grad")
            results[case.key]["grad_norm"] = engine.update(0.0, clip_norm=None)
        return results

    def trajectory(self, model: str, loss: str, **options: Any) -> dict[str, Any]:
        """AdamW steps on one batch, each cut another way."""
        engine, steps = self.engine(model, **options), []
        for number in range(ADAM_STEPS):
            result = self.step(engine, Case(model, loss, *CUTTINGS[number]))
            steps.append((result.loss, engine.update(LR, clip_norm=CLIP)))
        copies = {name: tensor.clone() for name, tensor in engine.full_tensors() if name == "output_layer.weight"}
        return {"steps": steps, "weights": self.tensors(engine, "weight"), "heads": copies}

    def repeated(self, model: str) -> dict[str, Any]:
        """Two steps in each dtype, twice, with deterministic kernels asked for."""
        results: dict[str, Any] = {}
        torch.use_deterministic_algorithms(True)
        for dtype in (torch.float32, torch.bfloat16):
            for turn in ("first", "again"):
                engine = self.engine(model, dtype=dtype, megatron={"deterministic_mode": True})
                steps = []
                for _ in range(2):
                    result = self.step(engine, Case(model, "gvpo", SMALL, packing=True))
                    gradients = self.tensors(engine, "grad")
                    steps.append((result.loss, gradients, engine.update(LR, clip_norm=CLIP)))
                results[f"{dtype} {turn}"] = {"steps": steps, "weights": self.tensors(engine, "weight")}
        torch.use_deterministic_algorithms(False)
        return results

    def modes(self) -> dict[str, Any]:
        """Each loss in each pass mode that is exact for it."""
        results, engine = {}, self.engine("llama")
        for loss in MODES[self.name]:
            sequences, coupled = self.batch("llama", loss).sequences, choose_loss(LOSSES[loss][0]).traits().coupled
            for budget, packing in EXTREMES:
                case = Case("llama", loss, budget, packing)
                current = score(
                    engine,
                    sequences,
                    coupled=coupled,
                    cutting=Cutting(budget, packing=packing),
                    by_token=True,
                    entropy=True,
                    accuracy=True,
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
            batch, cutting = self.batch("llama", loss), Cutting(SMALL)
            coupled = choose_loss(raw).traits().coupled
            results[loss] = self.agreed(evaluate(engine, batch, choose_loss(raw), cutting=cutting))
            by_token = score(engine, batch.sequences, coupled=coupled, cutting=cutting, by_token=True)
            totals = score(engine, batch.sequences, coupled=coupled, cutting=cutting, by_token=False)
            results[kind] = {
                "by_token": [(one.total, one.logp_N, one.lse_N) for one in by_token],
                "totals": [(one.total, one.logp_N, one.lse_N) for one in totals],
            }
        return results

    def recompute(self, model: str) -> dict[str, Any]:
        results = {}
        for recompute in ("none", "selective", "full"):
            engine = self.engine(model, recompute=recompute)
            result = self.step(engine, Case(model, "gvpo", SMALL, packing=True))
            results[recompute] = {"loss": result.loss, "gradients": self.tensors(engine, "grad")}
        return results

    def adapted(self, model: str, lora: Lora = ADAPTERS, **options: Any) -> MegatronEngine:
        """An engine with drawn adapters."""
        engine = self.engine(model, lora=lora, **options)
        draw_adapters(engine)
        return engine

    def lora(self, model: str) -> dict[str, Any]:
        """Adapters as they begin, switched off, and trained; with recomputed layers and overlapped gathers too."""
        case, plain = Case(model, "gvpo", SMALL, packing=True), self.engine(model)
        sequences, cutting = self.batch(model, "gvpo").sequences, Cutting(SMALL)
        results: dict[str, Any] = {"base": self.agreed(self.step(plain, case)), "steps": []}
        engine = self.engine(model, lora=FEW_ADAPTERS)
        results["begun"] = self.agreed(self.step(engine, case))
        results["few"] = {name: tensor.clone() for name, tensor in engine.adapter_tensors()}
        engine = self.adapted(model)
        with engine.adapters_off():
            off = [score(one, sequences, coupled=True, cutting=cutting, by_token=True) for one in (engine, plain)]
        results["off"] = all(torch.equal(mine.logp_N, theirs.logp_N) for mine, theirs in zip(*off, strict=True))
        results["shapes"] = {name: tensor.shape for name, tensor in engine.adapter_tensors()}
        for number in range(ADAM_STEPS):
            result = self.agreed(self.step(engine, Case(model, "gvpo", *CUTTINGS[number])))
            assert result["same_on_all_ranks"]
            if number == 0:
                results["gradients"] = {name: tensor.clone() for name, tensor in engine.adapter_tensors("grad")}
            results["steps"].append((result["loss"], engine.update(ADAPTER_LR, clip_norm=CLIP)))
        results["adapters"] = {name: tensor.clone() for name, tensor in engine.adapter_tensors()}
        results["weights"] = self.tensors(engine, "weight")
        for name, options in {"full": {"recompute": "full"}, "overlap": OVERLAP_BOTH}.items():
            engine = self.adapted(model, **options)
            self.step(engine, Case(model, "gvpo", *CUTTINGS[0]))
            results[name] = {name: tensor.clone() for name, tensor in engine.adapter_tensors("grad")}
            engine.update(ADAPTER_LR, clip_norm=CLIP)
            results[f"{name} next"] = self.step(engine, Case(model, "gvpo", *CUTTINGS[1])).loss
        return results

    def bf16_lora(self) -> dict[str, Tensor]:
        engine = self.adapted("deep", dtype=torch.bfloat16)
        self.step(engine, Case("deep", "gvpo", *CUTTINGS[0]))
        return {name: tensor.clone() for name, tensor in engine.adapter_tensors("grad")}

    def heads(self) -> dict[str, Any]:
        """The same two-pass and single-pass steps with heads computed in each way there is."""
        results = {}
        for name, (model, engine_options) in HEAD_WAYS.items():
            engine = self.engine(model, **engine_options)
            for loss in ("sft", "gvpo"):
                result = self.step(engine, Case(model, loss, SMALL, packing=True))
                results[f"{name} {loss}"] = {"loss": result.loss, "gradients": self.tensors(engine, "grad")}
        return results

    def bf16(self) -> dict[str, Any]:
        """One GVPO loss, then ten steps of which each is far below what a bf16 weight can resolve."""
        engine = self.engine("llama", dtype=torch.bfloat16)
        losses, weights = [], [self.tensors(engine, "weight")]
        for _ in range(10):
            losses.append(self.step(engine, Case("llama", "gvpo", LARGE, packing=True)).loss)
            engine.update(1e-4, clip_norm=CLIP)
            weights.append(self.tensors(engine, "weight"))
        return {"losses": losses, "before": weights[0], "first": weights[1], "last": weights[-1]}
