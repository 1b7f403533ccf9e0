"""Implements the Megatron-Core engine: GPTModel stages, pipeline schedules, DDP, distributed optimizer (ZeRO-1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from megalign.convert import hf_parts, hf_state
from megalign.data.micro_batch import ContextPart, MicroBatch, context_part
from megalign.engines.head import Head
from megalign.engines.megatron import checkpoint, weights
from megalign.engines.megatron.balance import Balance, balance
from megalign.engines.megatron.grad_norm import use_device_norm
from megalign.engines.megatron.groups import Groups
from megalign.engines.megatron.optimizer_state import fuse
from megalign.engines.megatron.replicas import replicas
from megalign.engines.megatron.shard import DDP_FIELDS, EngineOptions, Shard
from megalign.engines.protocol import LOGP_ONLY, Objective, Want
from megalign.engines.replicas import Replica
from megalign.engines.saving import Saving
from megalign.engines.scoring import BaseModel
from megalign.model_config import ModelConfig
from megalign.models.experts import balancing, counting
from megalign.models.gpt import PolicyModel
from megalign.models.slots import Slots
from megalign.ops.linear_logp import TokenLogp
from megalign.ops.transfer import to_device
from megalign.runtime import cpu_shims
from megalign.runtime.ranks import max_over_job


@dataclass(frozen=True, slots=True)
class AdamW:
    """Holds the optimizer settings that stay the same over a job; the learning rate comes with each update."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None  # gradients are scaled to at most this norm


class MegatronEngine:
    """Trains a shard of a model with `adamw`, or only scores if that is None; weights are zero until loaded."""

    note = ""

    def __init__(
        self, model: ModelConfig, groups: Groups, options: EngineOptions, *, adamw: AdamW | None, seed: int = 0
    ) -> None:
        cpu_shims.install()
        model_parallel_cuda_manual_seed(seed)
        self.shard = Shard(model, groups, options, seed=seed)
        self.adamw = adamw
        self.device, self.dtype, self.shape = options.device, options.dtype, self.shard.batch_shape
        self.balances_experts = model.moe is not None and options.aux_loss_coefficient > 0
        self._balance: Balance | None = None
        self._wrapped: list[Any] = list(self.shard.chunks)
        self.optimizer: Any = None
        if adamw is not None:
            self._make_trainable(adamw)

    def load_weights(self, hf_dir: Path) -> None:
        """Fill this rank's shard from a Hugging Face directory, reading only what it owns."""
        weights.load_hf(self.shard, hf_dir)
        if self.optimizer is not None:
            self.optimizer.reload_model_params()

    def _make_trainable(self, adamw: AdamW) -> None:
        """Wrap the chunks in DDP and create the distributed optimizer; both hold copies of the weights."""
        options, config = self.shard.options, self.shard.config
        passed = {key: value for key, value in options.megatron.items() if key in DDP_FIELDS}
        ddp_config = DistributedDataParallelConfig(
            **({"grad_reduce_in_fp32": True, "use_distributed_optimizer": True} | passed)
        )
        self._wrapped = [
            DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(self.shard.chunks)
        ]
        config.finalize_model_grads_func = lambda model, num_tokens, **kwargs: finalize_model_grads(
            model, None, **kwargs
        )
        if self.device.type == "cuda":
            use_device_norm()
        several = len(self._wrapped) > 1
        no_sync = [chunk.no_sync for chunk in self._wrapped]
        config.no_sync_func = no_sync if several else no_sync[0]
        if ddp_config.overlap_grad_reduce:
            start = [chunk.start_grad_sync for chunk in self._wrapped]
            config.grad_sync_func = start if several else start[0]
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1.0,
                weight_decay=adamw.weight_decay,
                adam_beta1=adamw.betas[0],
                adam_beta2=adamw.betas[1],
                adam_eps=adamw.eps,
                bf16=options.dtype == torch.bfloat16,
                params_dtype=options.dtype,
                use_distributed_optimizer=ddp_config.use_distributed_optimizer,
                overlap_param_gather=ddp_config.overlap_param_gather,
                clip_grad=0.0,  # `update` clips, after checking that the norm is finite
            ),
            self._wrapped,
            use_gloo_process_groups=options.device.type == "cuda",
        )
        # Where only experts have adapters, Megatron keeps a stub optimizer for the rest, which it cannot save.
        parts = self.optimizer.chained_optimizers
        self.optimizer.chained_optimizers = [part for part in parts if not part.is_stub_optimizer]
        if self.device.type == "cuda":
            fuse(self.optimizer)
        cpu_shims.install()
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()

    def forward(self, batches: Sequence[MicroBatch], want: Want = LOGP_ONLY) -> list[TokenLogp]:
        """Return each micro-batch's log-probs and what `want` selects, fp32 [N]; an empty list off the last stage."""

        def score(index: int, head: Head) -> tuple[Tensor, Any]:
            scored = head.logp(entropy=want.entropy, accuracy=want.accuracy)
            return scored.logp_N.sum(), scored

        for chunk in self._wrapped:
            chunk.eval()
        if not self.balances_experts:
            with torch.no_grad():
                return self._run(batches, score, forward_only=True)
        with torch.no_grad(), counting(self.shard.routers, device=self.device) as counts:
            results = self._run(batches, score, forward_only=True)
        self._balance = balance(batches, counts, self.shard)
        return results

    def aux_loss(self) -> float:
        """Return the experts' auxiliary loss of the last `forward`'s batches, on every rank; 0 where there is none."""
        return 0.0 if self._balance is None else self._balance.loss

    def base(self) -> BaseModel:
        """Return a scorer of the same weights without adapters."""
        return BaseModel(self, self.shard.adapters_off)

    def backward(self, batches: Sequence[MicroBatch], objective: Objective) -> list[Any]:
        """Accumulate the gradient of the objectives' sum over the whole job; return payloads on the last stage.

        With an auxiliary loss, raises RuntimeError unless these are the batches of the last `forward`.
        """
        for chunk in self._wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if not self.balances_experts:
            return self._run(batches, objective, forward_only=False)
        if self._balance is None or not self._balance.is_of(batches):
            raise RuntimeError("backward with an auxiliary loss must follow a forward pass over the same batches")
        with balancing(self.shard.routers, self._balance.gradients):
            return self._run(batches, objective, forward_only=False)

    def _run(self, batches: Sequence[MicroBatch], objective: Objective, *, forward_only: bool) -> list[Any]:
        shard, device = self.shard, self.device
        groups = shard.groups
        parts = [context_part(batch, groups.context_rank, groups.context_size) for batch in batches]

        def step(iterator: Iterator[tuple[int, MicroBatch, ContextPart]], model: Any) -> tuple[Tensor, Any]:
            index, batch, part = next(iterator)
            shard.options.beat()
            chunk: PolicyModel = getattr(model, "module", model)
            hidden = model(
                to_device(part.token_L, device),
                to_device(part.position_L, device),
                to_device(part.length_L, device),
                Slots(batch.cu_seqlens, device, groups.context),
                shard.padding(part) if self.balances_experts else None,
            )
            if not chunk.post_process:
                return hidden, None
            return hidden, lambda output: _with_count(*objective(index, shard.head(batch, part, output)))

        if groups.virtual_size > 1:
            shard.config.microbatch_group_size_per_vp_stage = _interleaved_group(len(batches), groups.pipeline_size)
        inputs = [(index, batch, part) for index, (batch, part) in enumerate(zip(batches, parts, strict=True))]
        iterators = [iter(inputs) for _ in shard.chunks]
        return get_forward_backward_func()(  # type: ignore[no-any-return]
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._wrapped,
            num_microbatches=len(batches),
            seq_length=max(batch.num_positions for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def update(self, lr: float) -> float:
        """Take an AdamW step with the gradient scaled by min(1, clip_norm / (norm + 1e-6)); return the unscaled norm.

        A norm that is not finite is returned without a step.
        """
        assert self.adamw is not None
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            # Megatron leaves this to its own scheduler, without which one-dimensional parameters would decay too.
            group["weight_decay"] = self.adamw.weight_decay * group.get("wd_mult", 1.0)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if math.isfinite(norm):
            clip_norm = self.adamw.clip_norm
            factor = 1.0 if clip_norm is None else clip_norm / (norm + 1e-6)
            if factor < 1.0:
                self._scale_gradients(factor)
            self.optimizer.step_with_ready_grads()
            self._forget_gathered()
            self._balance = None
        return norm

    def _scale_gradients(self, factor: float) -> None:
        for part in self.optimizer.chained_optimizers:
            for parameter in part.get_parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def _forget_gathered(self) -> None:
        """Reset the "parameters already gathered" flag.

        Megatron resets it in zero_grad, but scoring may come first and would use stale weights.
        """
        for chunk in self._wrapped:
            if chunk.ddp_config.overlap_param_gather:
                for bucket in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                    bucket.param_gather_dispatched = False

    def sum_over_data(self, value: Tensor) -> Tensor:
        """Sum the last stage's values over data ranks and broadcast the sum to every stage.

        Context ranks hold the same values; those of other stages are ignored.
        """
        groups = self.shard.groups
        total = (value if groups.last_stage else torch.zeros_like(value)).to(self.device, copy=True)
        dist.all_reduce(total, group=groups.data)
        if groups.pipeline_size > 1:
            last = dist.get_global_rank(groups.pipeline, groups.pipeline_size - 1)
            dist.broadcast(total, src=last, group=groups.pipeline)
        return total.to(value.device)

    def max_over_job(self, value: float) -> float:
        """Return the maximum over all ranks."""
        return max_over_job(value, device=self.device)

    def replicas(self) -> Iterator[Replica]:
        """Yield the parameters that several ranks hold alike, with their groups."""
        self._gather_updates()
        return replicas(self.shard)

    def full_tensors(self, kind: str = "weight") -> Iterator[tuple[str, Tensor]]:
        """Yield (Megatron name, whole tensor) in pipeline order, on every rank; kind "grad" gives fp32 gradients."""
        self._gather_updates()
        return weights.full_tensors(self.shard, self._gradient if kind == "grad" else None)

    def hf_tensors(self, kind: str = "weight") -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, whole tensor) one at a time, on every rank; kind "grad" gives fp32 gradients."""
        return hf_state(self.shard.model, self.full_tensors(kind))

    def own_hf_tensors(self) -> Iterator[tuple[str, int | None, Tensor]]:
        """Yield (Hugging Face name, expert, weight) of what this rank writes; over all ranks each comes once."""
        self._gather_updates()
        for name, full in weights.own_tensors(self.shard):
            yield from hf_parts(name, full, self.shard.model)

    def adapter_tensors(self, kind: str = "weight") -> Iterator[tuple[str, Tensor]]:
        """Yield (PEFT name, whole tensor) of each adapter, on every rank; kind: weight or grad."""
        self._gather_updates()
        return weights.adapter_tensors(self.shard, self._gradient if kind == "grad" else None)

    def _gradient(self, parameter: torch.nn.Parameter) -> Tensor:
        """Return the reduced gradient of a parameter; under ZeRO-1 each data rank holds only its range of it."""
        gradient: Tensor = parameter.main_grad.detach().clone()  # type: ignore[attr-defined]
        ranges = [
            part._get_model_param_range_map(parameter)["param"]
            for part in self.optimizer.chained_optimizers
            if hasattr(part, "_get_model_param_range_map") and parameter in part.model_param_gbuf_map
        ]
        groups = self.shard.groups
        copies = groups.data_context if getattr(parameter, "allreduce", True) else groups.expert_data
        if copies.size() > 1:
            flat, owned = gradient.view(-1), torch.zeros_like(gradient).view(-1)
            for held in ranges:
                owned[held.start : held.end] = flat[held.start : held.end]
            dist.all_reduce(owned, group=copies)
            gradient = owned.view_as(gradient)
        return gradient

    def _gather_updates(self) -> None:
        """Gather updated parameters now: with overlap Megatron gathers them in the next forward pass, too late here."""
        for chunk in self._wrapped if self.optimizer is not None else ():
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def begin_save(self, folder: Path, extra: dict[str, Any], *, copied: bool) -> Saving:
        """Prepare to write weights, optimizer and `extra` (plain values) as a `torch_dist` checkpoint."""
        self._gather_updates()
        return checkpoint.begin_save(self.shard, self.optimizer, folder, extra, copied=copied)

    def load(self, folder: Path) -> dict[str, Any]:
        """Load what a save wrote under any layout; return its `extra`."""
        return checkpoint.load(self.shard, self.optimizer, folder)


def _with_count(loss: Tensor, payload: Any) -> tuple[Tensor, Tensor, Any]:
    """Return Megatron's three values; the token count is unused, because the divisor is already inside the loss."""
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), payload


def _interleaved_group(num_batches: int, stages: int) -> int:
    """Return how many micro-batches a chunk takes in a row: the fewest that the interleaved schedule accepts."""
    return next(
        size for size in range(stages, num_batches + 1) if num_batches % size == 0 or num_batches % size >= stages
    )
