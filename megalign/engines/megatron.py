"""The Megatron-Core engine: GPTModel stages, pipeline schedules, DDP and the distributed optimizer (ZeRO-1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from megalign.convert.model_config import ModelConfig
from megalign.data.batch import MicroBatch
from megalign.engines import megatron_state
from megalign.engines.engine import Head, MicroBatchShape, Objective
from megalign.engines.groups import Groups
from megalign.models.gpt import build_stage, transformer_config
from megalign.ops.head_blocks import HeadConfig
from megalign.ops.hidden_rows import TokenShard
from megalign.ops.linear_logp import TokenLogp
from megalign.ops.vocab import VocabShard, tile_rows
from megalign.runtime import cpu_shims

DDP_FIELDS = frozenset(DistributedDataParallelConfig.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class AdamW:
    """Optimizer settings that stay the same over a job; the rate comes with each update."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a model is laid out and computed."""

    dtype: torch.dtype
    device: torch.device
    layers: str = "torch"
    sequence_parallel: bool = False
    recompute: str = "none"
    temperature: float = 1.0
    chunk_tokens: int | None = None
    tp_invariant: bool = False
    megatron: dict[str, Any] = field(default_factory=dict)  # passed through to Megatron's configurations


class MegatronEngine:
    """One rank's part of a model; with `adamw` it trains, without it only scores.

    Weights are undefined until `load_weights` or `load`.
    """

    def __init__(
        self, model: ModelConfig, groups: Groups, options: EngineOptions, *, adamw: AdamW | None, seed: int = 0
    ) -> None:
        cpu_shims.install()
        model_parallel_cuda_manual_seed(seed)
        self.model, self.groups, self.options, self.adamw = model, groups, options, adamw
        self.device = options.device
        self.source: Path | None = None  # the Hugging Face directory that the weights came from
        self.cut = MicroBatchShape(
            groups.data_rank, groups.data_size, groups.tensor_size if options.sequence_parallel else 1
        )
        passed = {key: value for key, value in options.megatron.items() if key not in DDP_FIELDS}
        self.config = transformer_config(
            model,
            tensor=groups.tensor_size,
            pipeline=groups.pipeline_size,
            sequence_parallel=options.sequence_parallel,
            dtype=options.dtype,
            on_cuda=options.device.type == "cuda",
            recompute=options.recompute,
            extra=passed,
        )
        self.stage = build_stage(
            model, self.config, layers=options.layers, first=groups.first_stage, last=groups.last_stage
        ).to(options.device, options.dtype)
        self.head_cfg = HeadConfig(
            temperature=options.temperature,
            scale=model.logit_scale,
            softcap=model.logit_softcap,
            chunk_tokens=options.chunk_tokens,
            tp_invariant=options.tp_invariant,
            into_main_grad=True,
        )
        self.layer_numbers = [layer.layer_number - 1 for layer in self.stage.decoder.layers]
        self._wrapped: Any = self.stage
        self.optimizer: Any = None

    def load_weights(self, hf_dir: Path) -> None:
        """Fill this rank's shard from a Hugging Face directory, reading only what it owns."""
        megatron_state.load_hf(self, hf_dir)
        self.source = hf_dir
        self._after_load()

    def _after_load(self) -> None:
        if self.adamw is None:
            return
        if self.optimizer is None:
            self._make_trainable(self.adamw)
        else:
            self.optimizer.reload_model_params()

    def _make_trainable(self, adamw: AdamW) -> None:
        """Wrap in DDP and the distributed optimizer; after loading, because both copy the weights."""
        passed = {key: value for key, value in self.options.megatron.items() if key in DDP_FIELDS}
        ddp_config = DistributedDataParallelConfig(
            **({"grad_reduce_in_fp32": True, "use_distributed_optimizer": True} | passed)
        )
        self._wrapped = DistributedDataParallel(self.config, ddp_config, self.stage)
        self.config.finalize_model_grads_func = lambda model, num_tokens, **kwargs: finalize_model_grads(
            model, None, **kwargs
        )
        self.config.no_sync_func = self._wrapped.no_sync
        if ddp_config.overlap_grad_reduce:
            self.config.grad_sync_func = self._wrapped.start_grad_sync
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1.0,
                weight_decay=adamw.weight_decay,
                adam_beta1=adamw.betas[0],
                adam_beta2=adamw.betas[1],
                adam_eps=adamw.eps,
                bf16=self.options.dtype == torch.bfloat16,
                params_dtype=self.options.dtype,
                use_distributed_optimizer=ddp_config.use_distributed_optimizer,
                overlap_param_gather=ddp_config.overlap_param_gather,
                clip_grad=0.0,  # clipping happens in `update`, where the norm is looked at first
            ),
            [self._wrapped],
            use_gloo_process_groups=self.options.device.type == "cuda",
        )
        cpu_shims.install()
        self._wrapped.zero_grad_buffer()

    def forward(
        self, batches: Sequence[MicroBatch], *, entropy: bool = False, accuracy: bool = False
    ) -> list[TokenLogp]:
        """Log-probs and what else is asked for of each micro-batch, fp32 [N]; none off the last stage."""

        def score(place: int, head: Head) -> tuple[Tensor, Any]:
            found = head.logp(entropy=entropy, accuracy=accuracy)
            return found.logp_N.sum(), found

        self._wrapped.eval()
        with torch.no_grad():
            return self._run(batches, score, forward_only=True)

    def backward(self, batches: Sequence[MicroBatch], objective: Objective) -> list[Any]:
        """Gradients of the summed objectives of all micro-batches and data ranks; payloads on the last stage."""
        self._wrapped.train()
        self._wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(batches, objective, forward_only=False)

    def _run(self, batches: Sequence[MicroBatch], objective: Objective, *, forward_only: bool) -> list[Any]:
        place = iter(range(len(batches)))

        def step(iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
            batch = next(iterator)
            device = self.options.device
            hidden = model(
                batch.token_T.to(device),
                batch.position_T.to(device),
                batch.cu_seqlens.to(device),
                int((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).max()),
            )
            if not self.groups.last_stage:
                return hidden, None
            return hidden, lambda output: _with_count(*objective(next(place), self._head(batch, output)))

        return get_forward_backward_func()(  # type: ignore[no-any-return]
            forward_step_func=step,
            data_iterator=iter(batches),
            model=[self._wrapped],
            num_microbatches=len(batches),
            seq_length=max(batch.num_positions for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _head(self, batch: MicroBatch, hidden_T1H: Tensor) -> Head:
        device, tokens, scored_L = self.options.device, None, batch.scored_N
        if self.options.sequence_parallel:
            # Ranks hold equal runs of positions; scored ones fall on them unevenly.
            positions, rank = len(hidden_T1H), self.groups.tensor_rank
            borders = torch.searchsorted(batch.scored_N, torch.arange(self.groups.tensor_size + 1) * positions)
            tokens = TokenShard(tuple(borders.diff().tolist()), rank)
            scored_L = batch.scored_N[borders[rank] : borders[rank + 1]] - rank * positions
        weight = self.stage.head_weight
        rows = weight.shape[0]
        return Head(
            hidden_LH=hidden_T1H.squeeze(1).index_select(0, scored_L.to(device)),
            weight_VH=weight,
            target_N=batch.target_N.to(device),
            shard=VocabShard(
                self.groups.tensor_rank * rows,
                rows,
                self.model.vocab_size,
                self.groups.tensor,
                tile_rows(self.model.padded_vocab_size),
            ),
            tokens=tokens,
            cfg=self.head_cfg,
        )

    def update(self, lr: float, *, clip_norm: float | None) -> float:
        """AdamW at rate `lr` with the gradient scaled by min(1, clip_norm / (norm + 1e-6)); its norm before that.

        A norm that is not finite is returned without a step.
        """
        assert self.adamw is not None
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            # Megatron leaves this to its own scheduler, without which one-dimensional parameters would decay too.
            group["weight_decay"] = self.adamw.weight_decay * group.get("wd_mult", 1.0)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if norm == norm and norm != float("inf"):
            for part in self.optimizer.chained_optimizers:
                if clip_norm is not None and clip_norm / (norm + 1e-6) < 1.0:
                    for parameter in part.get_parameters():
                        if parameter.grad is not None:
                            parameter.grad.mul_(clip_norm / (norm + 1e-6))
            self.optimizer.step_with_ready_grads()
        return norm

    def sum_over_data(self, value: Tensor) -> Tensor:
        """Sum over data ranks of what last-stage ranks hold, brought to every stage; others' values are ignored."""
        total = value.to(self.options.device) if self.groups.last_stage else torch.zeros_like(value)
        total = total.to(self.options.device, copy=True)
        dist.all_reduce(total, group=self.groups.data)
        if self.groups.pipeline_size > 1:
            last = dist.get_global_rank(self.groups.pipeline, self.groups.pipeline_size - 1)
            dist.broadcast(total, src=last, group=self.groups.pipeline)
        return total.to(value.device)

    def max_over_job(self, value: float) -> float:
        """The largest value any rank holds."""
        held = torch.tensor(value, dtype=torch.float64, device=self.options.device)
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return float(held)

    def full_tensors(self, kind: str = "weight") -> Iterator[tuple[str, Tensor]]:
        """Whole tensors in pipeline order, the same on every rank, one at a time; kind "grad" gives fp32 gradients."""
        self._gather_updates()
        return megatron_state.full_tensors(self, kind)

    def _gather_updates(self) -> None:
        """With overlap, ranks gather each other's updates in the next forward pass; here weights are read before it."""
        if self.optimizer is not None and self._wrapped.ddp_config.overlap_param_gather:
            self._wrapped.start_param_sync(force_sync=True)

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """Write a `torch_dist` checkpoint of weights, optimizer and `extra` (plain values) into an empty folder."""
        self._gather_updates()
        megatron_state.save(self, folder, extra)

    def load(self, folder: Path) -> dict[str, Any]:
        """Load what `save` wrote, at any layout; the `extra` it was given."""
        return megatron_state.load(self, folder)


def _with_count(loss: Tensor, payload: Any) -> tuple[Tensor, Tensor, Any]:
    """Megatron's three-value form; the count is unused, because the divisor is already inside the loss."""
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), payload
