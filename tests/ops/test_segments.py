"""Sums of token values by sequence."""

import torch

from megalign.ops.segments import segment_sum


def test_sums_keep_what_float32_would_lose():
    # in float32, 1e8 + 1 is 1e8, so the first sum would be 0
    value_T = torch.tensor([1e8, 3.0, 1.0, -1e8, 4.0])
    total_S = segment_sum(value_T, torch.tensor([0, 2, 0, 0, 2]), 4)
    assert total_S.dtype == torch.float64
    assert total_S.tolist() == [1.0, 0.0, 7.0, 0.0]


def test_gradient_reaches_each_token_from_its_own_segment():
    value_T = torch.zeros(4, requires_grad=True)
    (segment_sum(value_T, torch.tensor([1, 0, 1, 2]), 3) * torch.tensor([10.0, 20.0, 30.0])).sum().backward()
    assert value_T.grad.tolist() == [20.0, 10.0, 20.0, 30.0]


def test_no_tokens():
    assert segment_sum(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 2).tolist() == [0.0, 0.0]
