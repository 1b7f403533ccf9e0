"""Measures what ZeRO costs in one process: engines of one model take turns, step by step, beside a plain torch loop.

Started by benchmarks.engines: python -m benchmarks.contenders.overhead OUTPUT STEPS CONFIG.yaml ...
with the configuration of ZeRO-3 last

The plain loop runs the DeepSpeed engine's own policy (transformers' layers, this project's head and packing) under
torch's AdamW and torch's clipping, without DeepSpeed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from megalign.config.job import JobConfig, load_config
from megalign.convert.hf.model import read_model
from megalign.data.group import Response, TokenSequence
from megalign.data.micro_batch import MicroBatch
from megalign.engines.build import engine_package, packing_of
from megalign.engines.deepspeed.engine import DeepSpeedEngine
from megalign.engines.head import Head
from megalign.engines.protocol import Engine, Objective
from megalign.engines.step import StepBatch, accumulate
from megalign.runtime.distributed import World, process_group
from megalign.runtime.quiet import quiet_libraries

PLAIN = "plain torch loop"


class PlainLoop(DeepSpeedEngine):
    """Trains the policy of a DeepSpeed engine as a loop of torch alone does."""

    adamw: torch.optim.Optimizer

    @classmethod
    def of(cls, engine: DeepSpeedEngine, lr: float) -> PlainLoop:
        """Return the loop of an engine that was built as a scorer, so that DeepSpeed has no hold of its policy."""
        policy = cast(torch.nn.Module, engine.policy)
        policy.requires_grad_(True)
        loop = cls(engine.policy, engine.weights, None, engine.ranks, shape=engine.shape, settle=engine.settle)
        loop.note = engine.note
        loop.adamw = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0, fused=True)
        return loop

    def backward(self, batches: Sequence[MicroBatch], objective: Objective) -> list[Any]:
        """Accumulate the gradient; return the objectives' payloads."""
        payloads: list[Any] = []
        self.policy.train()
        self.adamw.zero_grad()
        for index, batch in enumerate(batches):

            def loss_of_head(head: Head, index: int = index) -> Tensor:
                loss, payload = objective(index, head)
                payloads.append(payload)
                return loss

            self.policy(partial(self.policy.loss, batch, loss_of_head)).backward()
        return payloads

    def update(self, lr: float) -> float:
        """Take a step with the gradient clipped to 1; return the norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(cast(torch.nn.Module, self.policy).parameters(), 1.0)
        self.adamw.step()
        return float(norm)


def main(arguments: Sequence[str]) -> int:
    """Write {name: CPU seconds of each step} to OUTPUT."""
    output, steps, *paths = arguments
    quiet_libraries()
    torch.set_num_threads(1)
    with process_group(timeout_s=600) as world:
        configs = [load_config(path, [f"run.steps={steps}"]) for path in paths]
        batch = _first_batch(configs[0])
        runs: dict[str, tuple[Callable[[], None], Any]] = {}

        def add(name: str, cfg: JobConfig, *, trainable: bool) -> None:
            run = _step_of(cfg, _engine(cfg, world, trainable=trainable), batch)
            runs[name] = run, functional.linear

        for cfg in configs:
            if cfg.engine.name == "deepspeed" and PLAIN not in runs:
                add(PLAIN, cfg, trainable=False)
            stage = f" ZeRO-{cfg.engine.zero.stage}" if cfg.engine.name == "deepspeed" else ""
            add(f"megalign, {cfg.engine.name}{stage}", cfg, trainable=True)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(int(steps)):
            for name, (run, linear) in runs.items():
                functional.linear = linear  # ZeRO-3 replaces it for the whole process
                start = time.process_time()
                run()
                if number:
                    times[name].append(time.process_time() - start)
        Path(output).write_text(json.dumps(times), encoding="utf-8")
    return 0


def _first_batch(cfg: JobConfig) -> StepBatch:
    """Return a step's first records, whose words are token ids."""
    assert cfg.data.path is not None
    lines = Path(cfg.data.path).read_text(encoding="utf-8").splitlines()[: cfg.data.groups_per_step]
    texts = [(record["prompt"], record["completion"]) for record in map(json.loads, lines)]
    ids = [(tuple(map(int, prompt.split())), tuple(map(int, response.split()))) for prompt, response in texts]
    sequences = [
        TokenSequence(index, index, "response", prompt, Response(response))
        for index, (prompt, response) in enumerate(ids)
    ]
    return StepBatch(sequences, num_groups=len(sequences))


def _engine(cfg: JobConfig, world: World, *, trainable: bool) -> Engine:
    package, model = engine_package(cfg), read_model(Path(cfg.model.path))
    engine = package.build(cfg, model, package.connect(cfg, world), world, trainable=trainable)
    engine.load_weights(model.folder)
    return engine


def _step_of(cfg: JobConfig, engine: Any, batch: StepBatch) -> Callable[[], None]:
    """Return a function that takes one optimizer step with the engine; a scorer becomes the plain loop."""
    lr = cfg.optimizer.lr
    if isinstance(engine, DeepSpeedEngine) and not engine.trains:
        engine = PlainLoop.of(engine, lr)

    def step() -> None:
        accumulate(engine, batch, cfg.loss, packing=packing_of(cfg))
        engine.update(lr)

    return step


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
