"""Runs a transformers model over micro-batches and gives objectives the scored hidden states and the head.

Axes: T positions of a packed row, B rows of L positions each where sequences cannot be packed, H hidden, N scored
tokens, M of them on this context rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalign.convert.hf.auto_model import decoder_of
from megalign.data.micro_batch import ContextPart, MicroBatch, contiguous_part
from megalign.engines.deepspeed.attention import PackedRows
from megalign.engines.head import ContextTokens, Head
from megalign.ops.head_blocks import HeadConfig
from megalign.ops.transfer import to_device
from megalign.ops.vocab import VocabShard, tile_rows

LossOfHead = Callable[[Head], Tensor]


class HFPolicy(nn.Module):
    """Wraps an `AutoModelForCausalLM` and computes losses of its head's input, one micro-batch at a time.

    `packs`: all sequences of a micro-batch are one row, else each is a row padded to the longest. `attention`:
    megalign's own, where the model uses it. `engines.deepspeed.probe` sets both, and the head's scale and soft cap.
    """

    def __init__(self, model: Any, head_cfg: HeadConfig) -> None:
        super().__init__()
        self.model, self.head_cfg = model, head_cfg
        # Without positions, packed sequences cannot be told apart.
        self.takes_positions = "position_ids" in inspect.signature(decoder_of(model).forward).parameters
        self.packs = False
        self.attention: PackedRows | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of weights and activations."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def head_parameters(self) -> list[Any]:
        """Return the head's parameters."""
        return [*self.model.get_output_embeddings().parameters(recurse=False)]

    @property
    def vocab_size(self) -> int:
        """Return the number of rows of the head."""
        return shape_of(self.model.get_output_embeddings().weight)[0]

    @property
    def context(self) -> dist.ProcessGroup | None:
        """Return the group of ranks that share a row's positions; None where each rank has whole rows."""
        return None if self.attention is None else self.attention.context

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        """Return what `compute` does: all use of the model is inside this call, around which ZeRO has its hooks."""
        return compute()

    def loss(self, batch: MicroBatch, loss_of_head: LossOfHead) -> Tensor:
        """Return the loss that `loss_of_head` computes from the head's inputs; called inside `forward`."""
        part = self._part(batch)
        hidden_LH = self.hidden(batch, part)
        head = self.model.get_output_embeddings()
        with gathered(self.head_parameters, keep=torch.is_grad_enabled()):
            return loss_of_head(self._head(batch, part, hidden_LH, head))

    def _part(self, batch: MicroBatch) -> ContextPart:
        group = self.context
        return contiguous_part(batch, 0, 1) if group is None else contiguous_part(batch, group.rank(), group.size())

    def hidden(self, batch: MicroBatch, part: ContextPart) -> Tensor:
        """Return the decoder's last hidden states [L, H] of this rank's positions."""
        # An attribute access to the head's weight here would make ZeRO-3 gather it for the whole pass, twice.
        device = self.head_parameters[0].device
        tokens, positions = to_device(part.token_L, device), to_device(part.position_L, device)
        rows = 1 if self.packs else len(batch.cu_seqlens) - 1
        inputs = {"input_ids": tokens.view(rows, -1)}
        if self.takes_positions:
            inputs["position_ids"] = positions.view(rows, -1)
        if self.packs and self.attention is not None:
            inputs["cu_seq_lens_q"] = batch.cu_seqlens
        hidden: Tensor = decoder_of(self.model)(**inputs, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)

    def _head(self, batch: MicroBatch, part: ContextPart, hidden_LH: Tensor, head: Any) -> Head:
        device, rows, context = hidden_LH.device, len(head.weight), None
        if self.context is not None:
            context = ContextTokens(to_device(part.index_M, device), len(batch.scored_N), self.context)
        return Head(
            hidden_LH=hidden_LH.index_select(0, to_device(part.scored_M, device)),
            weight_VH=head.weight,
            target_M=to_device(part.target_M, device),
            shard=VocabShard(0, rows, rows, tile=tile_rows(rows, device.type)),
            tokens=None,
            context=context,
            cfg=self.head_cfg,
            bias_V=getattr(head, "bias", None),
        )


def is_partitioned(parameter: Any) -> bool:
    """Tell whether a parameter is one of ZeRO-3's, of which this rank keeps a partition."""
    return hasattr(parameter, "ds_id")


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Return a parameter's shape, also while ZeRO-3 has it partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def gathered(parameters: Sequence[Any], *, keep: bool = False) -> Iterator[None]:
    """Gather ZeRO-3's parameters inside the block; with `keep` they stay, until `release` is called after backward."""
    absent = [each for each in parameters if is_partitioned(each) and each.ds_status.name == "NOT_AVAILABLE"]
    if absent:
        absent[0].all_gather(absent)
    try:
        yield
    finally:
        if not keep:
            release(absent)


def release(parameters: Sequence[Any]) -> None:
    """Partition ZeRO-3's parameters again, unless they are small enough to be kept gathered."""
    present = [
        each
        for each in parameters
        if is_partitioned(each) and each.ds_status.name == "AVAILABLE" and not each.ds_persist
    ]
    if present:
        present[0].partition(present)
