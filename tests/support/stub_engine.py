"""An engine of plain torch and transformers on one process: what a new engine has to bring, and no more."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megalign.config.job import JobConfig
from megalign.convert.hf.model import HFModel
from megalign.convert.hf.writer import specs_of
from megalign.data.micro_batch import MicroBatch
from megalign.data.packing import MicroBatchShape
from megalign.engines.build import dtype_of, temperature_of
from megalign.engines.head import Head
from megalign.engines.needs import RankNeeds
from megalign.engines.protocol import LOGP_ONLY, Objective, Want
from megalign.engines.saving import Saving, Written, listing
from megalign.ops.head_blocks import HeadConfig
from megalign.ops.linear_logp import TokenLogp
from megalign.ops.vocab import VocabShard
from megalign.runtime.distributed import World


class StubEngine:
    """Runs sequences one by one; a step is torch's AdamW, without decay of norms and biases."""

    balances_experts = False
    note = ""
    shape = MicroBatchShape(0, 1)

    def __init__(self, cfg: JobConfig, device: torch.device) -> None:
        self.cfg, self.device, self.dtype = cfg, device, dtype_of(cfg)
        self.load_weights(Path(cfg.model.path))

    def load_weights(self, hf_dir: Path) -> None:
        """Load a model, and make its optimizer."""
        self.hf_dir, section = hf_dir, self.cfg.optimizer
        self.model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=self.dtype).to(self.device)
        parameters = list(self.model.parameters())
        decayed = [parameter for parameter in parameters if parameter.dim() > 1]
        groups = [
            {"params": decayed, "weight_decay": section.weight_decay},
            {"params": [parameter for parameter in parameters if parameter.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=section.betas, eps=section.eps)

    def _head(self, batch: MicroBatch) -> Head:
        slots = batch.token_T.split(batch.cu_seqlens.diff().tolist())
        hidden_TH = torch.cat([self.model.model(slot[None].to(self.device)).last_hidden_state[0] for slot in slots])
        weight_VH, scored_N = self.model.lm_head.weight, batch.scored_N.to(self.device)
        rows, cfg = len(weight_VH), HeadConfig(temperature=temperature_of(self.cfg))
        target_N = batch.target_N.to(self.device)
        return Head(hidden_TH[scored_N], weight_VH, target_N, VocabShard(0, rows, rows), None, None, cfg)

    def forward(self, batches: Sequence[MicroBatch], want: Want = LOGP_ONLY) -> list[TokenLogp]:
        """Return the log-probs of each micro-batch."""
        with torch.no_grad():
            return [self._head(batch).logp(entropy=want.entropy, accuracy=want.accuracy) for batch in batches]

    def backward(self, batches: Sequence[MicroBatch], objective: Objective) -> list[Any]:
        """Accumulate the objectives' gradients."""
        self.optimizer.zero_grad()
        payloads = []
        for index, batch in enumerate(batches):
            loss, payload = objective(index, self._head(batch))
            loss.backward()  # type: ignore[no-untyped-call]
            payloads.append(payload)
        return payloads

    def update(self, lr: float) -> float:
        """Clip and step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        limit = self.cfg.optimizer.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), float("inf") if limit is None else limit)
        if norm.isfinite():
            self.optimizer.step()
        return float(norm)

    def hf_tensors(self, kind: str = "weight") -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter or gradient."""
        for name, tensor in self.model.named_parameters():
            yield name, tensor.detach() if kind == "weight" else tensor.grad

    def own_hf_tensors(self) -> Iterator[tuple[str, int | None, Tensor]]:
        """Yield every parameter: there is one rank."""
        return ((name, None, tensor) for name, tensor in self.hf_tensors())

    def begin_save(self, folder: Path, extra: dict[str, Any], *, copied: bool) -> Saving:
        """Write everything into one file."""
        state = [self.model.state_dict(), self.optimizer.state_dict(), extra]
        state = copy.deepcopy(state) if copied else state

        def write() -> Written:
            torch.save(state, folder / "all.pt")
            (folder / "hf").mkdir()
            shutil.copyfile(self.hf_dir / "config.json", folder / "hf" / "config.json")
            return Written(listing(folder, ["all.pt"]))

        return Saving(3 * sum(parameter.nbytes for parameter in self.model.parameters()), write, lambda abouts: None)

    def load(self, folder: Path) -> dict[str, Any]:
        """Read it again."""
        model, optimizer, extra = torch.load(folder / "all.pt", weights_only=True)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        return dict(extra)

    aux_loss: Callable[..., float] = lambda self: 0.0
    max_over_job: Callable[..., float] = lambda self, value: value
    sum_over_data: Callable[..., Tensor] = lambda self, value: value
    adapter_tensors: Callable[..., Iterator[tuple[str, Tensor]]] = lambda self, kind="weight": iter(())
    base: Callable[..., StubEngine] = lambda self: self
    replicas: Callable[..., Iterator[Any]] = lambda self: iter(())


def check_weights(model: HFModel) -> None:
    """Take every checkpoint: transformers tells what it lacks."""


def layout_problem(cfg: JobConfig, model: HFModel, world_size: int, *, trained: bool) -> str | None:
    """Refuse every job of several ranks."""
    return None if world_size == 1 else f"engine.name is {cfg.engine.name}: ranks are {world_size}; must be 1"


def check(cfg: JobConfig, model: HFModel) -> None:
    """Take everything."""


def checkpoint_bytes(cfg: JobConfig, model: HFModel) -> int:
    """Return the size of weights and moments in fp32."""
    return 3 * 4 * sum(spec.num_bytes // spec.dtype.itemsize for spec in specs_of(model, dtype_of(cfg)).values())


def rank_needs(cfg: JobConfig, model: HFModel, world_size: int, *, device: str) -> list[RankNeeds]:
    """Estimate weights, gradients and moments alone."""
    weights = sum(spec.num_bytes for spec in specs_of(model, dtype_of(cfg)).values())
    count = weights // dtype_of(cfg).itemsize
    return [RankNeeds("every rank", count, weights, weights, 2 * weights, activations=0, head=0)]


def connect(cfg: JobConfig, world: World) -> None:
    """Do nothing: one process needs no groups."""


def describe(cfg: JobConfig, model: HFModel, connection: None, world: World) -> str:
    """Return a word for the log."""
    return "plain torch"


def build(cfg: JobConfig, model: HFModel, connection: None, world: World, *, trainable: bool) -> StubEngine:
    """Build the engine."""
    return StubEngine(cfg, world.device)
