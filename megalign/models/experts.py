"""Implements what Megatron's mixture of experts lacks: a router with an exact auxiliary loss, and sums in fixed order.

The loss, which is the same for every layout and packing, is coefficient x sum over layers of E x sum_e f_e P_e (Switch
Transformer, arXiv 2101.03961, equation 4): f_e the fraction of (token, choice) pairs of the global batch that are
routed to expert e, P_e the mean softmax probability of e, both over real tokens. A forward pass without gradient counts
both; the f_e of the whole job then enter the next backward pass as constants, so that the loss is a sum over tokens.
Axes: T token positions on this rank, E experts, R rows of experts, one for each token and expert that it chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megalign.model_config import MoeConfig

if TYPE_CHECKING:
    from typing import Self  # Python 3.11


def complete_megatron() -> None:
    """Give Megatron's experts sums in a fixed order, and the router torch's product.

    Where TransformerEngine is, Megatron's router would use its product, which computes fp32 in TF32; where it is not,
    the name that Megatron reads to see this is not defined.
    """
    moe_utils.te_general_gemm = None
    token_dispatcher.permute, token_dispatcher.unpermute = permute, unpermute


def permute(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Copy each token to its experts' rows as Megatron's `permute` does; the gradient is summed in the experts' order.

    Megatron adds with atomics on CUDA: in the tokens' dtype, and in an order that differs from call to call. On a CPU
    its sums have these bits, and take less time.
    """
    options: dict[str, Any] = {"num_out_tokens": num_out_tokens, "fused": fused, "drop_and_pad": drop_and_pad}
    if fused or drop_and_pad or not tokens.is_cuda:
        return moe_utils.permute(tokens, routing_map, probs, **options)  # type: ignore[no-any-return]
    # The chosen (expert, token) pairs in order, by a sort: to select them by a mask, the host waits for their number.
    assert num_out_tokens is not None
    chosen = routing_map.t().reshape(-1).to(torch.uint8)
    pair_R = chosen.argsort(descending=True, stable=True)[:num_out_tokens]
    token_R = pair_R % len(tokens) if len(tokens) else pair_R
    permuted_probs = None if probs is None else probs.t().reshape(-1).index_select(0, pair_R)
    return _Spread.apply(tokens, token_R), permuted_probs, token_R  # type: ignore[no-untyped-call]


def unpermute(permuted_tokens: Tensor, sorted_indices: Tensor, restore_shape: torch.Size, **options: Any) -> Tensor:
    """Sum the rows of each token's experts as Megatron's `unpermute` does, but always in the experts' order."""
    fused = options.get("fused") or options.get("drop_and_pad")
    if fused or options.get("probs") is not None or not permuted_tokens.is_cuda:
        return moe_utils.unpermute(permuted_tokens, sorted_indices, restore_shape, **options)  # type: ignore[no-any-return]
    return _Collect.apply(permuted_tokens, sorted_indices, restore_shape[0])  # type: ignore[no-any-return,no-untyped-call]


def _sum_by_token(rows_RH: Tensor, token_R: Tensor, tokens: int) -> Tensor:
    """Sum the rows of each token, of which all have equally many, in their order; half precision in fp32."""
    if not len(rows_RH):
        return rows_RH.new_zeros(tokens, rows_RH.shape[1])
    order_R = token_R.argsort(stable=True)
    return rows_RH.index_select(0, order_R).view(tokens, -1, rows_RH.shape[1]).sum(dim=1)


class _Spread(torch.autograd.Function):
    """Copies tokens to rows; backward sums the rows of each token."""

    @staticmethod
    def forward(ctx: Any, tokens_TH: Tensor, token_R: Tensor) -> Tensor:
        ctx.save_for_backward(token_R)
        ctx.tokens = len(tokens_TH)
        return tokens_TH.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (token_R,) = ctx.saved_tensors
        return _sum_by_token(grads[0], token_R, ctx.tokens), None


class _Collect(torch.autograd.Function):
    """Sums the rows of each token; backward copies a token's gradient to its rows."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, token_R: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(token_R)
        return _sum_by_token(rows_RH, token_R, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, *ctx.saved_tensors), None, None


class OwnOutputLinear(RowParallelLinear):
    """Clones an expert's output: Megatron adds the bias to it in place, which autograd forbids on a view."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(x)
        return output.clone(), bias


class BalancedRouter(TopKRouter):
    """Adds the auxiliary loss and its statistics to Megatron's router, inside `counting` and `balancing`."""

    def __init__(self, *args: Any, moe: MoeConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.moe = moe
        if moe.selection_bias:
            # Megatron updates its own buffer by the experts' load; here the routing bias stays as in the checkpoint.
            del self.expert_bias
            bias_E = nn.Parameter(torch.zeros(moe.num_experts, dtype=torch.float32), requires_grad=False)
            self.register_parameter("expert_bias", bias_E)
        self.counts_2E: Tensor | None = None  # float64: (token, choice) pairs, sums of probabilities
        self.gradient_E: Tensor | None = None  # fp32: d loss / d a real token's probability of each expert

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (routing weights, chosen mask), [T, E] each; padding_mask: tokens left out of the statistics."""
        plain = self.moe.score == "softmax" and self.moe.groups == 1
        probs_TE, chosen_TE = super().routing(logits) if plain else self._choose(logits.view(-1, self.num_experts))
        training = self.training and torch.is_grad_enabled()
        if padding_mask is None or (self.gradient_E if training else self.counts_2E) is None:
            return probs_TE, chosen_TE
        real_T1 = ~padding_mask.reshape(-1, 1)
        softmax_TE = self._scores(logits.view(-1, logits.shape[-1]), share=True)
        if training:
            assert self.gradient_E is not None
            loss = (softmax_TE * real_T1 * self.gradient_E).sum()
            return MoEAuxLossAutoScaler.apply(probs_TE, loss), chosen_TE
        if not self.training and self.counts_2E is not None:
            self.counts_2E += torch.stack(
                [(value_TE * real_T1).sum(dim=0, dtype=torch.float64) for value_TE in (chosen_TE, softmax_TE)]
            )
        return probs_TE, chosen_TE

    def _scores(self, logits_TE: Tensor, *, share: bool = False) -> Tensor:
        """Return router scores (softmax or sigmoid); share=True normalises them to sum to one."""
        if self.moe.score == "softmax":
            return logits_TE.softmax(dim=-1)
        scores_TE = logits_TE.sigmoid()
        return scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20) if share else scores_TE

    def _choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return (routing weights, chosen mask), group-limited (DeepSeek-V2, section 2.2.2; -V3, section 2.1.2)."""
        moe, scores_TE = self.moe, self._scores(logits_TE)
        choice_TE = scores_TE.detach()
        if moe.selection_bias:
            choice_TE = choice_TE + self.expert_bias
        by_group = choice_TE.view(-1, moe.groups, moe.num_experts // moe.groups)
        group_TG = by_group.topk(moe.group_best, dim=-1).values.sum(dim=-1)
        best_TG = torch.zeros_like(group_TG, dtype=torch.bool)
        best_TG.scatter_(1, group_TG.topk(moe.top_groups, dim=-1).indices, value=True)
        choice_TE = by_group.masked_fill(~best_TG[..., None], float("-inf")).flatten(1)
        chosen_TE = torch.zeros_like(choice_TE, dtype=torch.bool)
        chosen_TE.scatter_(1, choice_TE.topk(moe.top_k, dim=-1).indices, value=True)
        weights_TE = scores_TE * chosen_TE
        if moe.normalize:
            weights_TE = weights_TE / (weights_TE.sum(dim=-1, keepdim=True) + 1e-20)
        return weights_TE * moe.scale, chosen_TE

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert the module but keep the routing bias (e_score_correction_bias) in fp32."""
        super()._apply(fn, recurse)
        if self.moe.selection_bias:
            self.expert_bias.data = self.expert_bias.data.float()
        return self


@contextmanager
def counting(routers: Sequence[BalancedRouter], *, device: torch.device) -> Iterator[list[Tensor]]:
    """Let routers count real tokens in evaluation mode inside the block; yield the counts, float64 [2, E] each."""
    counts = [torch.zeros(2, router.num_experts, dtype=torch.float64, device=device) for router in routers]
    for router, counts_2E in zip(routers, counts, strict=True):
        router.counts_2E = counts_2E
    try:
        yield counts
    finally:
        for router in routers:
            router.counts_2E = None


@contextmanager
def balancing(routers: Sequence[BalancedRouter], gradients: Sequence[Tensor]) -> Iterator[None]:
    """Add the auxiliary loss, given by its derivatives [E] for each router, to backward passes inside the block."""
    for router, gradient_E in zip(routers, gradients, strict=True):
        router.gradient_E = gradient_E
    try:
        yield
    finally:
        for router in routers:
            router.gradient_E = None
