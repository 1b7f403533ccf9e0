"""The Megatron-Core engine: GPTModel stages, pipeline schedules, DDP and the distributed optimizer (ZeRO-1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from megalign.data.batch import ContextPart, MicroBatch, context_part
from megalign.engines import megatron_state
from megalign.engines.engine import ContextTokens, Head, MicroBatchShape, Objective
from megalign.engines.groups import Groups
from megalign.models.experts import BalancedRouter
from megalign.models.gpt import PolicyModel, build_chunks, transformer_config
from megalign.models.lora import Lora, Ranks, add_adapters
from megalign.ops.head_blocks import HeadConfig
from megalign.ops.hidden_rows import TokenShard
from megalign.ops.linear_logp import TokenLogp
from megalign.ops.vocab import VocabShard, tile_rows
from megalign.runtime import cpu_shims
from megalign.schema import UserError

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
    aux_loss_coefficient: float = 0.0
    lora: Lora | None = None  # train adapters alone
    base: str | None = None  # what the user calls the model that adapters are on
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
        self.device, self.dtype = options.device, options.dtype
        self.source: Path | None = None  # the Hugging Face directory that the weights came from
        self.cut = _batch_shape(model, groups, sequence_parallel=options.sequence_parallel)
        passed = {key: value for key, value in options.megatron.items() if key not in DDP_FIELDS}
        self.config = transformer_config(
            model,
            tensor=groups.tensor_size,
            pipeline=groups.pipeline_size,
            virtual=groups.virtual_size,
            context=groups.context_size,
            expert=groups.expert_size,
            sequence_parallel=options.sequence_parallel,
            dtype=options.dtype,
            on_cuda=options.device.type == "cuda",
            recompute=options.recompute,
            extra=passed,
        )
        chunks = build_chunks(
            model, self.config, layers=options.layers, first=groups.first_stage, last=groups.last_stage
        )
        self.chunks: list[PolicyModel] = [chunk.to(options.device, options.dtype) for chunk in chunks]
        if options.lora is not None:
            self._add_adapters(options.lora, seed)
        self.head_cfg = HeadConfig(
            temperature=options.temperature,
            scale=model.logit_scale,
            softcap=model.logit_softcap,
            chunk_tokens=options.chunk_tokens,
            tp_invariant=options.tp_invariant,
            into_main_grad=True,
        )
        self.balances_experts = model.moe is not None and options.aux_loss_coefficient > 0
        self._aux_loss = 0.0
        self._wrapped: list[Any] = list(self.chunks)
        self.optimizer: Any = None

    def _add_adapters(self, lora: Lora, seed: int) -> None:
        """Freeze the model and put adapters beside it."""
        groups, options = self.groups, self.options
        ranks = Ranks(groups.tensor, groups.data_context, groups.expert_data, options.sequence_parallel)
        for chunk in self.chunks:
            layers = megatron_state.linear_layers(self, chunk)
            chunk.requires_grad_(False)
            chunk.adapters = add_adapters(layers, self.model, lora, ranks, seed=seed)
            if not chunk.adapters.by_weight:
                raise UserError(
                    f"lora: pipeline rank {groups.pipeline_rank} has a stage without layers: nothing trains there; "
                    "engine.megatron.pipeline_model_parallel_layout must give every stage a layer"
                )

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
        self._wrapped = [
            DistributedDataParallel(self.config, ddp_config, chunk, disable_bucketing=place > 0)
            for place, chunk in enumerate(self.chunks)
        ]
        self.config.finalize_model_grads_func = lambda model, num_tokens, **kwargs: finalize_model_grads(
            model, None, **kwargs
        )
        several = len(self._wrapped) > 1
        no_sync = [chunk.no_sync for chunk in self._wrapped]
        self.config.no_sync_func = no_sync if several else no_sync[0]
        if ddp_config.overlap_grad_reduce:
            start = [chunk.start_grad_sync for chunk in self._wrapped]
            self.config.grad_sync_func = start if several else start[0]
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
            self._wrapped,
            use_gloo_process_groups=self.options.device.type == "cuda",
        )
        # Where adapters are on experts alone Megatron keeps a stand-in for all else, which it cannot save.
        parts = self.optimizer.chained_optimizers
        self.optimizer.chained_optimizers = [part for part in parts if not part.is_stub_optimizer]
        cpu_shims.install()
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()

    def forward(
        self, batches: Sequence[MicroBatch], *, entropy: bool = False, accuracy: bool = False
    ) -> list[TokenLogp]:
        """Log-probs and what else is asked for of each micro-batch, fp32 [N]; none off the last stage."""

        def score(place: int, head: Head) -> tuple[Tensor, Any]:
            found = head.logp(entropy=entropy, accuracy=accuracy)
            return found.logp_N.sum(), found

        for chunk in self._wrapped:
            chunk.eval()
        routers = self._routers
        for router in routers:
            router.counts_2E = torch.zeros(2, router.num_experts, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            found = self._run(batches, score, forward_only=True)
        if self.balances_experts:
            self._balance()
        return found

    @property
    def _routers(self) -> list[BalancedRouter]:
        """The routers of this rank's layers where they have a loss."""
        return [router for chunk in self.chunks for router in chunk.routers] if self.balances_experts else []

    def _balance(self) -> None:
        """The auxiliary loss of the batches just scored, and its derivatives for a backward pass over them."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for router in self._routers:
            counts_2E = router.counts_2E
            assert counts_2E is not None
            dist.all_reduce(counts_2E, group=self.groups.data_context)
            if self.options.sequence_parallel:
                dist.all_reduce(counts_2E, group=self.groups.tensor)
            pairs_E, probability_E = counts_2E
            num_tokens = pairs_E.sum() / router.topk
            scale = self.options.aux_loss_coefficient * router.num_experts / num_tokens
            pull_E = scale * pairs_E / pairs_E.sum()
            total += (pull_E * probability_E).sum()
            router.pull_E, router.counts_2E = pull_E.float(), None
        dist.all_reduce(total, group=self.groups.pipeline)
        self._aux_loss = float(total)

    def aux_loss(self) -> float:
        """The experts' auxiliary loss of the batches that `forward` took last, on every rank; 0 where there is none."""
        return self._aux_loss

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Within, the model is the one that adapters were put on."""
        adapters = [chunk.adapters for chunk in self.chunks if chunk.adapters is not None]
        for one in adapters:
            one.enabled = False
        try:
            yield
        finally:
            for one in adapters:
                one.enabled = True

    def backward(self, batches: Sequence[MicroBatch], objective: Objective) -> list[Any]:
        """Gradients of the summed objectives of all micro-batches and data ranks; payloads on the last stage.

        With an auxiliary loss of experts these must be the batches that `forward` took last.
        """
        for chunk in self._wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(batches, objective, forward_only=False)

    def _run(self, batches: Sequence[MicroBatch], objective: Objective, *, forward_only: bool) -> list[Any]:
        place = iter(range(len(batches)))
        groups, device = self.groups, self.options.device
        parts = [context_part(batch, groups.context_rank, groups.context_size) for batch in batches]

        def step(iterator: Iterator[tuple[MicroBatch, ContextPart]], model: Any) -> tuple[Tensor, Any]:
            batch, part = next(iterator)
            chunk: PolicyModel = getattr(model, "module", model)
            hidden = model(
                part.token_L.to(device),
                (batch.position_T if chunk.uses_te else part.position_L).to(device),
                part.length_L.to(device),
                batch.cu_seqlens.to(device),
                int(batch.cu_seqlens.diff().max()),
                self._padding(part) if self.balances_experts else None,
            )
            if not chunk.post_process:
                return hidden, None
            return hidden, lambda output: _with_count(*objective(next(place), self._head(batch, part, output)))

        if groups.virtual_size > 1:
            self.config.microbatch_group_size_per_vp_stage = _interleaved_group(len(batches), groups.pipeline_size)
        iterators = [iter(list(zip(batches, parts, strict=True))) for _ in self.chunks]
        return get_forward_backward_func()(  # type: ignore[no-any-return]
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._wrapped,
            num_microbatches=len(batches),
            seq_length=max(batch.num_positions for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _padding(self, part: ContextPart) -> Tensor:
        """Which positions of this rank's hidden states hold no token."""
        padding_L = ~part.real_L
        if self.options.sequence_parallel:
            padding_L = padding_L.chunk(self.groups.tensor_size)[self.groups.tensor_rank]
        return padding_L.to(self.device)

    def _head(self, batch: MicroBatch, part: ContextPart, hidden_T1H: Tensor) -> Head:
        device, groups, tokens, scored_L = self.options.device, self.groups, None, part.scored_M
        if self.options.sequence_parallel:
            # Ranks hold equal runs of positions; scored ones fall on them unevenly.
            positions, rank = len(hidden_T1H), groups.tensor_rank
            borders = torch.searchsorted(part.scored_M, torch.arange(groups.tensor_size + 1) * positions)
            tokens = TokenShard(tuple(borders.diff().tolist()), rank)
            scored_L = part.scored_M[borders[rank] : borders[rank + 1]] - rank * positions
        weight = self.chunks[-1].head_weight
        rows = weight.shape[0]
        context = None
        if groups.context_size > 1:
            context = ContextTokens(part.place_M.to(device), len(batch.scored_N), groups.context)
        return Head(
            hidden_LH=hidden_T1H.squeeze(1).index_select(0, scored_L.to(device)),
            weight_VH=weight,
            target_M=part.target_M.to(device),
            shard=VocabShard(
                groups.tensor_rank * rows,
                rows,
                self.model.vocab_size,
                groups.tensor,
                tile_rows(self.model.padded_vocab_size),
            ),
            tokens=tokens,
            context=context,
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
            self._forget_gathered()
        return norm

    def _forget_gathered(self) -> None:
        """Megatron forgets it with the gradients only, before backward; scoring runs before that, on new weights."""
        for chunk in self._wrapped:
            if chunk.ddp_config.overlap_param_gather:
                for bucket in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                    bucket.param_gather_dispatched = False

    def sum_over_data(self, value: Tensor) -> Tensor:
        """Sum over data ranks of what last-stage ranks hold, brought to every stage; others' values are ignored.

        Context ranks hold the same.
        """
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

    def own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Megatron name, whole weight) of what this rank is to write: over all ranks each weight comes once."""
        self._gather_updates()
        return megatron_state.own_tensors(self)

    def adapter_tensors(self, kind: str = "weight") -> Iterator[tuple[str, Tensor]]:
        """(name as in PEFT's files, whole tensor) of each adapter, the same on every rank; kind: weight or grad."""
        self._gather_updates()
        return megatron_state.adapter_tensors(self, kind)

    def _gather_updates(self) -> None:
        """With overlap, ranks gather each other's updates in the next forward pass; here weights are read before it."""
        for chunk in self._wrapped if self.optimizer is not None else ():
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """Write a `torch_dist` checkpoint of weights, optimizer and `extra` (plain values) into an empty folder."""
        self._gather_updates()
        megatron_state.save(self, folder, extra)

    def load(self, folder: Path) -> dict[str, Any]:
        """Load what `save` wrote, at any layout; the `extra` it was given."""
        return megatron_state.load(self, folder)


class BaseModel:
    """What an engine's adapters were put on, as far as scoring needs an engine."""

    def __init__(self, engine: MegatronEngine) -> None:
        self.engine, self.cut, self.device = engine, engine.cut, engine.device
        self.sum_over_data = engine.sum_over_data

    def forward(
        self, batches: Sequence[MicroBatch], *, entropy: bool = False, accuracy: bool = False
    ) -> list[TokenLogp]:
        """As the engine's own, with its adapters off."""
        with self.engine.adapters_off():
            return self.engine.forward(batches, entropy=entropy, accuracy=accuracy)


def _with_count(loss: Tensor, payload: Any) -> tuple[Tensor, Tensor, Any]:
    """Megatron's three-value form; the count is unused, because the divisor is already inside the loss."""
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), payload


def _batch_shape(model: ModelConfig, groups: Groups, *, sequence_parallel: bool) -> MicroBatchShape:
    """How micro-batches must be cut for every rank to hold as much of them as its neighbours."""
    context = groups.context_size
    slots = 2 * context if context > 1 else 1
    return MicroBatchShape(
        groups.data_rank,
        groups.data_size,
        multiple_of=math.lcm(slots, context * groups.tensor_size if sequence_parallel else 1),
        slot_multiple_of=slots,
        min_per_rank=groups.pipeline_size if groups.virtual_size > 1 else 1,
        attention_cost=model.attention_cost,
    )


def _interleaved_group(num_batches: int, stages: int) -> int:
    """Micro-batches that a chunk takes in a row: the fewest that the interleaved schedule accepts for this number."""
    return next(
        size for size in range(stages, num_batches + 1) if num_batches % size == 0 or num_batches % size >= stages
    )
