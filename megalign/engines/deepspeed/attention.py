"""Attention over packed rows for transformers' own models, and over parts of a row on the ranks of a context group.

Axes: B rows, L token positions of a row that this rank holds, T all of them, N heads, K key/value heads, D head
dimension, V that of values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalign.engines.deepspeed.ulysses import context_problem, heads_of_rank, positions_of_rank
from megalign.models.packed_attention import PackedAttention, Scores
from megalign.models.slots import Slots


class NotPackable(ValueError):
    """Says what a model asks of its attention that `PackedRows` does not compute."""


class PackedRows:
    """Computes causal attention inside each slot of a packed row, registered with transformers as `name`.

    A model whose `config._attn_implementation` is `name` calls it, with the slots' borders in the keyword argument
    `cu_seq_lens_q` of the model's forward: int32 [slots + 1], on any device, 0 first and the row's length last. Without
    it each row [B, L] is one sequence, whose positions count up, padding only behind it. A model that does not hand its
    keyword arguments down to its attention would attend across slots: `NotPackable` says so where the model makes its
    mask from `position_ids` that start anew; a model that does neither only a comparison of a packed row with its
    sequences one by one can tell. Windows come with the mask that the model makes, as in transformers' eager attention:
    some models tell the attention function none, or one that their mask does not have.

    context: the ranks that hold the row's contiguous parts (`data.micro_batch.contiguous_part`), all of one length;
    `cu_seq_lens_q` is that of the whole row then. Each rank's backward gives the gradients of its own part, so
    parameters' gradients are summed over the group. All ranks run forward and backward equally often. recompute:
    attention keeps only its inputs and computes again in backward.
    """

    def __init__(self, *, context: dist.ProcessGroup | None = None, recompute: bool = False) -> None:
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface

        self.context = context if context is not None and context.size() > 1 else None
        self.recompute = recompute
        # Of the last borders: all layers of a row are given the same.
        self._slots: tuple[Tensor, Slots] | None = None
        taken = [name for name in AttentionInterface() if name.startswith("megalign_packed_")]
        self.name = f"megalign_packed_{len(taken)}"
        AttentionInterface.register(self.name, self)
        AttentionMaskInterface.register(self.name, _mask)

    def __call__(
        self,
        module: Any,
        query_BNLD: Tensor,
        key_BKLD: Tensor,
        value_BKLV: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """Return [B, L, N, V] and no weights, as transformers' attention functions do; s_aux: the sinks [N]."""
        _refuse(module, rest)
        rows, _, length, _ = query_BNLD.shape
        if key_BKLD.shape[2] != length:
            raise NotPackable(f"attention has {key_BKLD.shape[2]} keys for {length} queries: must be equally many")
        window, packed = _read(attention_mask)
        scores = Scores(window, scaling, softcap)
        if cu_seq_lens_q is None:
            if packed or self.context is not None:
                raise NotPackable("the model's attention was not given cu_seq_lens_q: must be, in a packed row")
            cu_seq_lens_q = torch.arange(rows + 1, dtype=torch.int32) * length
        elif rows != 1:
            raise NotPackable(f"attention has {rows} rows with cu_seq_lens_q: must be one")
        if self._slots is None or self._slots[0] is not cu_seq_lens_q:
            self._slots = cu_seq_lens_q, Slots(cu_seq_lens_q, query_BNLD.device)
        query, key, value = (one.transpose(1, 2).flatten(0, 1) for one in (query_BNLD, key_BKLD, value_BKLV))
        return self._attend(query, key, value, self._slots[1], scores, s_aux).unflatten(0, (rows, length)), None

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, slots: Slots, scores: Scores, sinks_N: Tensor | None
    ) -> Tensor:
        """Return [L, N, V] of query [L, N, D], key [L, K, D] and value [L, K, V]."""
        if self.context is None:
            return self._inside_slots(query, key, value, slots, scores, sinks_N)
        ranks, rank, heads = self.context.size(), self.context.rank(), query.shape[1]
        problem = context_problem(heads, key.shape[1], ranks)
        if problem is not None:
            raise NotPackable(problem)
        mine = heads // ranks
        if sinks_N is not None:
            sinks_N = sinks_N[rank * mine : (rank + 1) * mine]
        out = self._inside_slots(*heads_of_rank(query, key, value, self.context), slots, scores, sinks_N)
        return positions_of_rank(out, self.context)

    def _inside_slots(
        self, query: Tensor, key: Tensor, value: Tensor, slots: Slots, scores: Scores, sinks_N: Tensor | None
    ) -> Tensor:
        attention = PackedAttention(scores)
        if not (self.recompute and torch.is_grad_enabled()):
            return attention(query, key, value, slots, sinks_N)
        again = checkpoint(attention, query, key, value, slots, sinks_N, use_reentrant=False, preserve_rng_state=False)
        return again  # type: ignore[no-any-return]


def _mask(
    *, local_size: int | None = None, allow_is_causal_skip: bool = True, use_vmap: bool = False, **rest: Any
) -> Tensor | None:
    """Return None for causal attention, else two numbers [1, 1, 2, 1] on the CPU that `_read` reads.

    transformers' mask functions call it for each kind of layer, and hand what it returns to those layers' attention.
    """
    # A chunk's size comes as a window's does, so a model that has chunks is refused.
    chunked = getattr(rest.get("config"), "attention_chunk_size", None)
    if use_vmap or chunked or "allow_is_bidirectional_skip" in rest:
        raise NotPackable("the model's attention mask is not a causal one, with or without a sliding window")
    if local_size is None and allow_is_causal_skip:
        return None
    # transformers forbids the skip where position_ids start anew, unless it was given a mask of padding.
    numbers = [local_size or 0, int(not allow_is_causal_skip)]
    return torch.tensor(numbers, dtype=torch.int64, device="cpu").view(1, 1, 2, 1)


def _read(mask: Tensor | None) -> tuple[int | None, bool]:
    """Return the sliding window and whether transformers sees a packed row."""
    if mask is None:
        return None, False
    if mask.dtype != torch.int64 or mask.shape != (1, 1, 2, 1):
        raise NotPackable("the model makes its attention mask itself: must take transformers' causal mask")
    window, packed = mask.flatten().tolist()
    return window or None, bool(packed)


def _refuse(module: Any, settings: dict[str, Any]) -> None:
    causal = settings.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise NotPackable("the model's attention is not causal")
    if settings.get("dropout"):
        raise NotPackable(f"attention's dropout is {settings['dropout']}: must be 0")
    for name in ("position_bias", "cache"):
        if settings.get(name) is not None:
            raise NotPackable(f"the model's attention has a {name}: must have none")
