"""Run the steps of `parity_cases` through the Megatron engine in one process of a layout, and keep the results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalign.config.layout import Layout as JobLayout
from megalign.convert import read_model_config
from megalign.engines.megatron.engine import AdamW, MegatronEngine
from megalign.engines.megatron.groups import make_groups
from megalign.engines.megatron.shard import EngineOptions
from megalign.runtime.distributed import World
from tests.support.lora_answers import draw_adapters
from tests.support.parity_cases import (
    AUX,
    CLIP,
    CUTTINGS,
    DECAY,
    EPS,
    HEAD_WAYS,
    HEADS,
    LARGE,
    LORA,
    LR,
    MODES,
    OVERLAP_BOTH,
    OVERLAPPED,
    RECOMPUTED,
    REPEATED,
    SMALL,
    Case,
    parity_cases,
    trajectories,
)
from tests.support.parity_layouts import EXPERTS, Layout
from tests.support.parity_steps import StepRuns


class Job(StepRuns):
    """The parts of one layout, each a dictionary of plain values and tensors."""

    def __init__(self, folder: Path, name: str, layout: Layout, world: World) -> None:
        super().__init__(folder, world)
        self.name, self.layout = name, layout
        axes = (layout.tensor, layout.pipeline, layout.virtual, layout.context, layout.expert, layout.sequence)
        self.groups = make_groups(JobLayout(*axes), timeout_s=120)

    def run(self) -> dict[str, Any]:
        """Every part that is asked for on this layout."""
        results: dict[str, Any] = {
            "parity": self.parity(parity_cases(self.name)),
            "trajectory": {f"{model} {loss}": self.trajectory(model, loss) for model, loss in trajectories(self.name)},
        }
        if self.name in MODES:
            results["modes"] = self.modes(MODES[self.name])
        if self.name in ("one", "tp2xpp2", "dp2"):
            results["score"] = self.scores()
        if self.name in RECOMPUTED:
            results["recompute"] = self.recompute(RECOMPUTED[self.name])
        if self.name in OVERLAPPED:
            results["overlap"] = self.trajectory(OVERLAPPED[self.name], "gvpo", **OVERLAP_BOTH)
        if self.name in REPEATED:
            results["repeated"] = self.repeated(REPEATED[self.name])
        if self.name in LORA:
            results["lora"] = self.lora(LORA[self.name], {"full": {"recompute": "full"}, "overlap": OVERLAP_BOTH})
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
        """A Megatron engine with a checkpoint's weights."""
        path = self.folder / model / checkpoint
        options = {"dtype": torch.float32, "device": self.world.device, **options}
        options |= {"aux_loss_coefficient": AUX if model in EXPERTS else 0.0}
        engine = MegatronEngine(
            replace(read_model_config(path), **(fields or {})),
            self.groups,
            EngineOptions(**options),
            adamw=AdamW(eps=EPS, weight_decay=DECAY, clip_norm=CLIP) if trains else None,
        )
        engine.load_weights(path)
        return engine

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
                    steps.append((result.loss, gradients, engine.update(LR)))
                results[f"{dtype} {turn}"] = {"steps": steps, "weights": self.tensors(engine, "weight")}
        torch.use_deterministic_algorithms(False)
        return results

    def bf16_lora(self) -> dict[str, Tensor]:
        """Adapter gradients of a bf16 step."""
        engine = self.adapted("deep", dtype=torch.bfloat16)
        self.step(engine, Case("deep", "gvpo", *CUTTINGS[0]))
        return {name: tensor.clone() for name, tensor in engine.adapter_tensors("grad")}

    def heads(self) -> dict[str, Any]:
        """Two-pass and single-pass steps with heads computed in each way there is."""
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
            engine.update(1e-4)
            weights.append(self.tensors(engine, "weight"))
        return {"losses": losses, "before": weights[0], "first": weights[1], "last": weights[-1]}

    def draw_adapters(self, engine: MegatronEngine) -> None:
        """Set an engine's adapters to the values of `lora_answers.drawn`, on each rank its part."""
        draw_adapters(engine)

    def heads_of(self, engine: MegatronEngine) -> dict[str, Tensor]:
        """The head where it is apart from the embedding, tied or not."""
        return {name: tensor.clone() for name, tensor in engine.full_tensors() if name == "output_layer.weight"}
