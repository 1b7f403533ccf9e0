"""Attention over parts of rows on several context ranks against whole rows on one, values and gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megalign.data.group import Response, TokenSequence
from megalign.data.micro_batch import context_part, pack
from megalign.models.packed_attention import PackedAttention, Scores
from megalign.models.slots import Slots
from megalign.runtime.distributed import process_group
from tests.support.processes import run_ranks
from tests.support.slow_attention import slow_attention

CASES = [
    (kv_heads, window, lengths)
    for kv_heads in (4, 2, 1)
    for window in (None, 1, 3, 7)
    for lengths in ([13], [2, 5, 5, 1, 9], [16, 16], [])
]


def tensors(num_positions, kv_heads):
    """Query, key, value and the output's gradient of a whole row, the same on every rank."""
    random = torch.Generator().manual_seed(num_positions + kv_heads)
    shapes = [(num_positions, heads, 6) for heads in (4, kv_heads, kv_heads)] + [(num_positions, 24)]
    return [torch.randn(shape, dtype=torch.float64, generator=random) for shape in shapes]


def check_ranks(size):
    with process_group(timeout_s=60) as world:
        for kv_heads, window, lengths in CASES:
            sequences = [TokenSequence(0, 0, "response", (1,), Response((1,) * (length - 1))) for length in lengths]
            batch = pack(sequences, range(len(lengths)), multiple_of=2 * size, slot_multiple_of=2 * size)
            *whole, upstream = tensors(batch.num_positions, kv_heads)
            whole = [one.requires_grad_() for one in whole]
            slots = batch.cu_seqlens.diff().tolist()
            answer = slow_attention(*whole, slots, window)
            answers = torch.autograd.grad(answer, whole, upstream)
            # What a rank holds of the row, found by laying the row's own numbers out as its tokens.
            numbered = SimpleNamespace(
                **{
                    name: getattr(batch, name)
                    for name in ("cu_seqlens", "position_T", "length_T", "real_T", "scored_N", "target_N")
                },
                token_T=torch.arange(batch.num_positions),
            )
            held = context_part(numbered, world.rank, size).token_L
            mine = [one.detach()[held].requires_grad_() for one in whole]
            parts = Slots(batch.cu_seqlens, world.device, dist.group.WORLD)
            out = PackedAttention(Scores(window))(*mine, parts).flatten(1)
            torch.testing.assert_close(out, answer[held], rtol=1e-12, atol=1e-12)
            for gradient, right in zip(torch.autograd.grad(out, mine, upstream[held]), answers, strict=True):
                torch.testing.assert_close(gradient, right[held], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [2, 3])
def test_parts_of_a_row_attend_as_the_whole(size):
    run_ranks(check_ranks, size, size)
