"""Log-probs of target tokens from hidden states and a vocabulary-parallel head, without ever holding all logits.

Axes: T tokens, H hidden, V this rank's rows of the vocabulary, C tokens of a chunk. A chunk at a time: logits in fp32,
their log-sum-exp and the target's logit where it is owned. After the last chunk one all-gather of `[2, T]` a rank is
merged pairwise in rank order. Backward recomputes a chunk's logits from the saved `lse_T`, so it needs no statistics
collective; its one reduction is that of dH over the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.ops.vocab import VocabShard

CHUNK_BYTES = 64 << 20


def linear_logp(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    shard: VocabShard,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and the log-sum-exp of its logits, fp32 `[T]`, equal on all ranks of the shard's group.

    One statistics collective forward, none backward; differentiable in hidden states and weight through the log-probs
    (not through lse). reduce_hidden_grad=False leaves dH partial for a caller that reduces it itself (sequence
    parallelism). Four matrix products for forward and backward.
    """
    return _Recompute.apply(  # type: ignore[no-any-return]
        hidden_TH, weight_VH, target_T, shard, temperature, _chunk(chunk_tokens, weight_VH), reduce_hidden_grad
    )


def weighted_logp(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    coefficient_T: Tensor,
    shard: VocabShard,
    *,
    lse_T: Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """(sum of coefficient x log-prob, log-probs `[T]` fp32): the gradient is formed while each chunk's logits exist.

    Three matrix products. With `lse_T` given, no statistics collective at all; the log-probs then are, on each rank,
    right where the target is owned and -lse elsewhere. Without it, one small all-gather a chunk (none on one rank).
    Only the sum is differentiable, and its upstream gradient must be a scalar the same on all ranks.
    """
    weighted, logp_T = _Weighted.apply(
        hidden_TH,
        weight_VH,
        target_T,
        coefficient_T,
        shard,
        lse_T,
        temperature,
        _chunk(chunk_tokens, weight_VH),
        reduce_hidden_grad,
    )
    return weighted, logp_T


def _chunk(chunk_tokens: int | None, weight_VH: Tensor) -> int:
    """Tokens a chunk: as asked for, else what keeps one fp32 buffer of logits within the budget."""
    return chunk_tokens or max(16, min(1024, CHUNK_BYTES // (4 * weight_VH.shape[0])))


def _buffer(hidden_TH: Tensor, shard: VocabShard, chunk: int) -> Tensor:
    """Room for the logits of one chunk, used by all: on a CPU fresh memory costs more than the exponentials in it."""
    rows = min(chunk, len(hidden_TH)) if hidden_TH.dtype == _wide(hidden_TH) else 0
    return hidden_TH.new_empty(rows, shard.num_real, dtype=_wide(hidden_TH))


def _logits(hidden_CH: Tensor, weight_VH: Tensor, shard: VocabShard, temperature: float, buffer_CV: Tensor) -> Tensor:
    """fp32 (float64 for float64 inputs) logits of a chunk over this rank's real rows, in the buffer where torch can."""
    weight = weight_VH[: shard.num_real]
    if hidden_CH.dtype == buffer_CV.dtype:
        logits = torch.mm(hidden_CH, weight.t(), out=buffer_CV[: len(hidden_CH)])
    elif hidden_CH.is_cuda:
        logits = torch.mm(hidden_CH, weight.t(), out_dtype=torch.float32)
    else:
        logits = hidden_CH.float() @ weight.float().t()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _target_logit(logits_CV: Tensor, target_C: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """(target's logit or 0, owned, row) for a chunk."""
    owned_C, row_C = shard.localize(target_C)
    if logits_CV.shape[1] == 0:
        return logits_CV.new_zeros(len(target_C)), owned_C, row_C
    return logits_CV.gather(1, row_C[:, None]).squeeze(1).where(owned_C, 0.0), owned_C, row_C


def _exponentials(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """(largest logit, log-sum-exp) of a chunk, whose logits become exp(logit - largest)."""
    if logits_CV.shape[1] == 0:
        nothing = logits_CV.new_full(logits_CV.shape[:1], -torch.inf)
        return nothing, nothing
    largest_C = logits_CV.amax(dim=1)
    total_C = logits_CV.sub_(largest_C[:, None]).exp_().sum(dim=1)
    return largest_C, total_C.log_().add_(largest_C)


def _merge(lse_T: Tensor, target_logit_T: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The whole vocabulary's (lse, target logit): one all-gather of the ranks' parts, merged pairwise in rank order."""
    if shard.group is None or dist.get_world_size(shard.group) == 1:
        return lse_T, target_logit_T
    mine = torch.stack((lse_T, target_logit_T))
    gathered = mine.new_empty((dist.get_world_size(shard.group), *mine.shape))
    dist.all_gather_into_tensor(gathered.view(-1), mine.view(-1), group=shard.group)
    parts = list(gathered[:, 0])
    while len(parts) > 1:
        pairs = [torch.logaddexp(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0], gathered[:, 1].sum(dim=0)


def _logits_grad(
    exponential_CV: Tensor, scale_C: Tensor | float, grad_C: Tensor, owned_C: Tensor, row_C: Tensor
) -> Tensor:
    """d(sum grad x logp)/d logits = grad x (onehot - p), written over exponentials that `scale_C` turns into p."""
    grad_CV = exponential_CV.mul_((grad_C * scale_C).neg_()[:, None])
    if grad_CV.shape[1]:
        grad_CV.scatter_add_(1, row_C[:, None], (grad_C * owned_C)[:, None])
    return grad_CV


def _accumulate(
    grad_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor, grad_hidden_CH: Tensor, grad_weight_VH: Tensor | None
) -> None:
    """Add a chunk's dW into `grad_weight_VH` (fp32 or better) and put its dH into `grad_hidden_CH`."""
    weight_VH = weight_VH[: grad_CV.shape[1]]
    if hidden_CH.is_cuda:
        grad_CV = grad_CV.to(hidden_CH.dtype)  # the fast products take their operands narrow and add up in fp32
    else:
        hidden_CH, weight_VH = hidden_CH.to(grad_CV.dtype), weight_VH.to(grad_CV.dtype)
    if grad_CV.dtype == grad_hidden_CH.dtype:
        torch.mm(grad_CV, weight_VH, out=grad_hidden_CH)
    else:
        grad_hidden_CH.copy_(grad_CV @ weight_VH)
    if grad_weight_VH is None:
        return
    if grad_CV.dtype == grad_weight_VH.dtype:
        grad_weight_VH[: len(weight_VH)].addmm_(grad_CV.t(), hidden_CH)
    else:
        grad_weight_VH[: len(weight_VH)] += grad_CV.t() @ hidden_CH


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _reduced(grad_TH: Tensor, shard: VocabShard, reduce: bool) -> Tensor:
    if reduce and shard.group is not None and dist.get_world_size(shard.group) > 1:
        dist.all_reduce(grad_TH, group=shard.group)
    return grad_TH


class _Recompute(torch.autograd.Function):
    """One all-gather forward; backward recomputes logits chunk by chunk and reduces dH once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        target_T: Tensor,
        shard: VocabShard,
        temperature: float,
        chunk: int,
        reduce: bool,
    ) -> tuple[Tensor, Tensor]:
        lse_T = hidden_TH.new_empty(len(target_T), dtype=_wide(hidden_TH))
        target_logit_T = torch.empty_like(lse_T)
        buffer_CV = _buffer(hidden_TH, shard, chunk)
        for start in range(0, len(target_T), chunk):
            part = slice(start, start + chunk)
            logits_CV = _logits(hidden_TH[part], weight_VH, shard, temperature, buffer_CV)
            target_logit_T[part] = _target_logit(logits_CV, target_T[part], shard)[0]
            lse_T[part] = _exponentials(logits_CV)[1]
        lse_T, target_logit_T = _merge(lse_T, target_logit_T, shard)
        ctx.save_for_backward(hidden_TH, weight_VH, target_T, lse_T)
        ctx.shard, ctx.temperature, ctx.chunk, ctx.reduce = shard, temperature, chunk, reduce
        ctx.mark_non_differentiable(lse_T)
        return target_logit_T - lse_T, lse_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, target_T, lse_T = ctx.saved_tensors
        grad_TH = torch.empty_like(hidden_TH)
        grad_VH = torch.zeros_like(weight_VH, dtype=_wide(weight_VH)) if ctx.needs_input_grad[1] else None
        buffer_CV = _buffer(hidden_TH, ctx.shard, ctx.chunk)
        for start in range(0, len(target_T), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits_CV = _logits(hidden_TH[part], weight_VH, ctx.shard, ctx.temperature, buffer_CV)
            owned_C, row_C = ctx.shard.localize(target_T[part])
            prob_CV = logits_CV.sub_(lse_T[part, None]).exp_()
            grad_CV = _logits_grad(prob_CV, 1.0, grad_T[part] / ctx.temperature, owned_C, row_C)
            _accumulate(grad_CV, hidden_TH[part], weight_VH, grad_TH[part], grad_VH)
        grad_TH = _reduced(grad_TH, ctx.shard, ctx.reduce)
        return grad_TH, None if grad_VH is None else grad_VH.to(weight_VH.dtype), None, None, None, None, None


class _Weighted(torch.autograd.Function):
    """Gradients formed forward; backward scales them and reduces dH once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        target_T: Tensor,
        coefficient_T: Tensor,
        shard: VocabShard,
        lse_T: Tensor | None,
        temperature: float,
        chunk: int,
        reduce: bool,
    ) -> tuple[Tensor, Tensor]:
        grad_TH = torch.empty_like(hidden_TH)
        grad_VH = torch.zeros_like(weight_VH, dtype=_wide(weight_VH)) if ctx.needs_input_grad[1] else None
        logp_T = hidden_TH.new_empty(len(target_T), dtype=_wide(hidden_TH))
        coefficient_T = coefficient_T.to(logp_T.dtype)
        buffer_CV = _buffer(hidden_TH, shard, chunk)
        for start in range(0, len(target_T), chunk):
            part = slice(start, start + chunk)
            logits_CV = _logits(hidden_TH[part], weight_VH, shard, temperature, buffer_CV)
            target_logit_C, owned_C, row_C = _target_logit(logits_CV, target_T[part], shard)
            if lse_T is None:
                largest_C, lse_C = _exponentials(logits_CV)
                lse_C, target_logit_C = _merge(lse_C, target_logit_C, shard)
                scale_C: Tensor | float = (largest_C - lse_C).exp_()
            else:
                lse_C = lse_T[part]
                logits_CV.sub_(lse_C[:, None]).exp_()
                scale_C = 1.0
            logp_T[part] = target_logit_C - lse_C
            grad_CV = _logits_grad(logits_CV, scale_C, coefficient_T[part] / temperature, owned_C, row_C)
            _accumulate(grad_CV, hidden_TH[part], weight_VH, grad_TH[part], grad_VH)
        ctx.shard, ctx.reduce, ctx.weight_dtype = shard, reduce, weight_VH.dtype
        ctx.save_for_backward(grad_TH, grad_VH)
        ctx.mark_non_differentiable(logp_T)
        return (coefficient_T * logp_T).sum(), logp_T

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_TH, grad_VH = ctx.saved_tensors
        grad_TH = _reduced(grad_TH * grad.to(grad_TH.dtype), ctx.shard, ctx.reduce)
        dense = None if grad_VH is None else (grad_VH.mul_(grad)).to(ctx.weight_dtype)
        return grad_TH, dense, None, None, None, None, None, None, None
