"""Implements the DeepSpeed engine: a model of transformers, or a shard of Megatron's, under ZeRO 1, 2 or 3.

Losses hold every divisor, so gradients are summed over ranks, never averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.data.micro_batch import MicroBatch
from megalign.data.packing import MicroBatchShape
from megalign.engines.deepspeed import checkpoint, gradients
from megalign.engines.deepspeed.fragments import weights_changed
from megalign.engines.deepspeed.policy import LossOfHead, release
from megalign.engines.deepspeed.ranks import Ranks
from megalign.engines.deepspeed.replicas import replicas
from megalign.engines.deepspeed.weights import Weights
from megalign.engines.head import Head
from megalign.engines.protocol import LOGP_ONLY, Objective, Want
from megalign.engines.replicas import Replica
from megalign.engines.saving import Saving
from megalign.engines.scoring import BaseModel
from megalign.ops.linear_logp import TokenLogp
from megalign.runtime.ranks import max_over_job


class Policy(Protocol):
    """Computes losses of a model's head, one micro-batch at a time; a torch module, inside whose call it is used."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of weights and activations."""

    @property
    def head_parameters(self) -> list[Any]:
        """Return the head's parameters, which a forward pass with gradients leaves gathered."""

    packs: bool  # whether all sequences of a micro-batch are one row; known once there are weights

    def train(self, mode: bool = True) -> Any:
        """Switch to training."""

    def eval(self) -> Any:
        """Switch to scoring."""

    def __call__(self, compute: Callable[[], Tensor]) -> Tensor:
        """Return what `compute` does, which uses the model."""

    def loss(self, batch: MicroBatch, loss_of_head: LossOfHead) -> Tensor:
        """Return the loss that `loss_of_head` computes from the head's inputs."""


class DeepSpeedEngine:
    """Trains a policy under `ds`, or only scores with it; its weights are arbitrary until they are loaded.

    ds: the engine that `deepspeed.initialize` returned for the policy; None for a scorer whose weights are not
    partitioned. settle: chooses, once there are weights, how sequences are run, and returns it in words.
    """

    balances_experts = False

    def __init__(
        self,
        policy: Policy,
        weights: Weights,
        ds: Any,
        ranks: Ranks,
        *,
        shape: MicroBatchShape,
        settle: Callable[[], str],
    ) -> None:
        self.policy, self.weights, self.ds, self.ranks, self.shape = policy, weights, ds, ranks, shape
        self.settle = settle
        self.note = ""  # how sequences are run; known once weights are loaded
        self.device, self.dtype = ranks.device, policy.dtype
        self.source: Path | None = None  # the Hugging Face directory that the weights came from

    @property
    def trains(self) -> bool:
        """Tell whether the engine has an optimizer."""
        return bool(self.weights.trained) and self.ds is not None

    def load_weights(self, hf_dir: Path) -> None:
        """Fill the weights from a Hugging Face directory, each rank what it keeps of them; the optimizer follows."""
        self.source = hf_dir
        self.weights.load(hf_dir)
        if self.trains:
            weights_changed(self.ds)
        if not self.note:
            self.note = self.settle()
            self.shape = replace(self.shape, pad_rows=not self.policy.packs)

    def forward(self, batches: Sequence[MicroBatch], want: Want = LOGP_ONLY) -> list[TokenLogp]:
        """Return each micro-batch's log-probs and what `want` selects, fp32 [N]."""
        results: list[TokenLogp] = []

        def score(head: Head) -> Tensor:
            results.append(head.logp(entropy=want.entropy, accuracy=want.accuracy))
            return results[-1].logp_N.sum()

        self.policy.eval()
        with torch.no_grad():
            for batch in batches:
                self.ranks.beat()
                self.policy(partial(self.policy.loss, batch, score))
        return results

    def aux_loss(self) -> float:
        """Return 0: no auxiliary loss is computed."""
        return 0.0

    def base(self) -> BaseModel:
        """Return a scorer of the same weights without adapters."""
        return BaseModel(self, self.weights.adapters_off)

    def backward(self, batches: Sequence[MicroBatch], objective: Objective) -> list[Any]:
        """Accumulate the gradient of the objectives' sum over the whole job; return their payloads."""
        payloads: list[Any] = []
        gradients.forget(self.ds)
        self.policy.train()
        for index, batch in enumerate(batches):
            self.ranks.beat()

            def loss_of_head(head: Head, index: int = index) -> Tensor:
                loss, payload = objective(index, head)
                payloads.append(payload)
                return loss

            self.ds.backward(self.ds(partial(self.policy.loss, batch, loss_of_head)))
            release(self.policy.head_parameters)
        return payloads

    def update(self, lr: float) -> float:
        """Take an AdamW step with the gradient clipped; return the norm before clipping.

        A norm that is not finite is returned without a step.
        """
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr
        self.ds.step()
        return float(self.ds.optimizer._global_grad_norm)

    def sum_over_data(self, value: Tensor) -> Tensor:
        """Sum values over the data ranks; the ranks that share a sequence hold the same ones."""
        total = value.to(self.device, copy=True)
        dist.all_reduce(total, group=self.ranks.data)
        return total.to(value.device)

    def max_over_job(self, value: float) -> float:
        """Return the maximum over all ranks."""
        return max_over_job(value, device=self.device)

    def replicas(self) -> Iterator[Replica]:
        """Yield the parameters that several ranks hold alike, with their groups."""
        return replicas(self.policy, self.ranks)

    def hf_tensors(self, kind: str = "weight") -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, whole tensor) one at a time, on every rank; kind "grad" gives fp32 gradients."""
        return self.weights.hf_tensors(gradients.reader(self.ds) if kind == "grad" else None)

    def own_hf_tensors(self) -> Iterator[tuple[str, int | None, Tensor]]:
        """Yield (Hugging Face name, None, weight) of what this rank writes; over all ranks each comes once."""
        return self.weights.own_hf_tensors()

    def adapter_tensors(self, kind: str = "weight") -> Iterator[tuple[str, Tensor]]:
        """Yield (PEFT name, whole tensor) of each adapter, on every rank; kind: weight or grad."""
        return self.weights.adapter_tensors(gradients.reader(self.ds) if kind == "grad" else None)

    def begin_save(self, folder: Path, extra: dict[str, Any], *, copied: bool) -> Saving:
        """Prepare to write weights, optimizer and `extra` (plain values), each rank what it owns.

        copied: ValueError where tensor ranks would have to join their parts meanwhile.
        """
        return checkpoint.begin_save(self.ds, self.weights, folder, extra, source=self.source, copied=copied)

    def load(self, folder: Path) -> dict[str, Any]:
        """Load what a save wrote at any number of ranks and any ZeRO stage; return its `extra`."""
        return checkpoint.load(self.ds, self.weights, folder)
