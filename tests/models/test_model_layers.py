"""Norm and attention of our own against slow versions."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from megalign.model_config import Rope
from megalign.models.layers import RMSNorm
from megalign.models.packed_attention import PackedAttention, Scores
from megalign.models.rope import Rotary, rotate
from megalign.models.slots import Slots
from tests.support.slow_attention import slow_attention


def config(**fields):
    """The fields of Megatron's configuration that these layers read."""
    return SimpleNamespace(
        **({"params_dtype": torch.float64, "sequence_parallel": False, "window_size": None} | fields)
    )


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[5], [1, 1, 4, 4, 2], [3, 3, 3], [2, 6, 1]])
def test_attention_stays_inside_each_slot(lengths, kv_heads, window):
    random = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    query, key, value = (
        torch.randn(tokens, heads, 6, dtype=torch.float64, generator=random, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    )
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    mine = PackedAttention(Scores(window))(query, key, value, Slots(borders, query.device)).flatten(1)
    slow = slow_attention(query, key, value, lengths, window)
    assert mine.shape == (tokens, 24)
    torch.testing.assert_close(mine, slow, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(tokens, 24, dtype=torch.float64, generator=random)
    leaves = (query, key, value)
    torch.testing.assert_close(torch.autograd.grad(mine, leaves, upstream), torch.autograd.grad(slow, leaves, upstream))


def test_norm_divides_by_the_root_mean_square():
    # mean square of (3, 4, 0, 0) is 25 / 4; with eps 0 its root is 2.5
    norm = RMSNorm(config(), 4, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    out = norm(torch.tensor([[3.0, 4.0, 0.0, 0.0]], dtype=torch.float64))
    assert out.tolist() == [pytest.approx([1.2, 3.2, 0.0, 0.0])]


def test_norm_in_half_precision_keeps_its_statistics_in_float32():
    # sums of squares of 4096 values near 1 in bfloat16 would stick at 256
    norm = RMSNorm(config(params_dtype=torch.bfloat16), 4096, eps=1e-6)
    x = 1 + torch.rand(2, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() * (x.double().square().mean(dim=1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(norm(x), exact.bfloat16(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("parallel", [True, False])
def test_norm_tells_megatron_whether_tensor_ranks_see_different_tokens(parallel):
    assert RMSNorm(config(sequence_parallel=parallel), 4).weight.sequence_parallel is parallel


@pytest.mark.parametrize(("family", "tables"), [("llama", torch.bfloat16), ("olmo2", torch.float32)])
def test_rotation_rounds_where_transformers_does(family, tables):
    modeling = import_module(f"transformers.models.{family}.modeling_{family}")
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(50, heads, 16, generator=random).bfloat16() for heads in (4, 2))
    position = torch.arange(50)
    cos_sin = Rotary((Rope(1000.0, 16),))(position, torch.full((50,), 50), tables)[0]
    cos, sin = torch.cat((cos_sin, cos_sin), dim=-1)[:, None]
    right = modeling.apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)
    for mine, theirs in zip((query, key), right, strict=True):
        rotated = rotate(mine, cos_sin, interleaved=False)
        assert rotated.dtype == torch.bfloat16
        assert torch.equal(rotated, theirs[0].transpose(0, 1))
