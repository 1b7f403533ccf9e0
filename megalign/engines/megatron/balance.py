"""Computes the experts' auxiliary loss of a global batch from the routers' counts in its scoring pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.data.micro_batch import MicroBatch
from megalign.engines.megatron.shard import Shard


@dataclass(frozen=True, slots=True)
class Balance:
    """Holds the auxiliary loss of the job's batches, and its derivatives for this rank's routers, in order."""

    batches: tuple[MicroBatch, ...]  # this rank's
    loss: float
    gradients: tuple[Tensor, ...]  # fp32 [E] each: d loss / d a real token's probability of each expert

    def is_of(self, batches: Sequence[MicroBatch]) -> bool:
        """Tell whether these are the same batch objects that were scored."""
        return [id(batch) for batch in batches] == [id(batch) for batch in self.batches]


def balance(batches: Sequence[MicroBatch], counts: Sequence[Tensor], shard: Shard) -> Balance:
    """Return the auxiliary loss (see `models.experts`) from this rank's counts, [2, E] float64 of each router."""
    groups, coefficient = shard.groups, shard.options.aux_loss_coefficient
    total = torch.zeros((), dtype=torch.float64, device=shard.options.device)
    gradients = []
    for router, counts_2E in zip(shard.routers, counts, strict=True):
        dist.all_reduce(counts_2E, group=groups.data_context)
        if groups.layout.sequence:
            dist.all_reduce(counts_2E, group=groups.tensor)
        pairs_E, probability_E = counts_2E
        num_tokens = pairs_E.sum() / router.topk
        scale = coefficient * router.num_experts / num_tokens
        gradient_E = scale * pairs_E / pairs_E.sum()
        total += (gradient_E * probability_E).sum()
        gradients.append(gradient_E.float())
    dist.all_reduce(total, group=groups.pipeline)
    return Balance(tuple(batches), float(total), tuple(gradients))
