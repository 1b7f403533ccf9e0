"""How far fp32 and half precision take log-probs and gradients from a dense float64 computation.

Axes: N tokens, V vocabulary, R rows of a tile, H hidden. Errors are norms of differences. What a dense fp32 computation
loses is the measure: a head by blocks adds up in another order, so it may lose a little more or less, not a digit more.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from megalign.ops.head_blocks import HeadConfig
from megalign.ops.linear_logp import linear_logp
from megalign.ops.vocab import VocabShard
from tests.support.head_calls import FORMS, assert_same, call, error, whole
from tests.support.slow_logp import Answer, Problem, dense_logits, make_problem, objective, solve

GRADIENTS = ("grad_NH", "grad_VH", "grad_V")
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("softcap", [None, 200.0])
def test_huge_logits_lose_no_more_than_dense_ones_and_an_fp32_lse(form, tile, softcap):
    # Logits of some hundreds: exp overflows float32 unless the largest is taken off first.
    problem = make_problem(20, 50, scale=30, bias=True)
    cfg, shard = HeadConfig(softcap=softcap, chunk_tokens=7), whole(problem, padding=0, tile=tile)
    entropy = form == "recompute"
    exact = solve(problem, softcap=softcap, entropy=entropy)
    single = solve(problem, softcap=softcap, entropy=entropy, dtype=torch.float32)
    assert exact.lse_N.max() > 100
    # the lse of a float32 pass over these logits, as a two-pass step has it: their common rounding cancels
    lse_N = call(problem, "recompute", shard, cfg=cfg, dtype=torch.float32).logp.lse_N
    answer = call(problem, form, shard, cfg=cfg, dtype=torch.float32, lse_N=lse_N, entropy=entropy).answer()
    cost = cost_of_fp32_lse(problem, exact, softcap)
    for name in ("logp_N", "lse_N", *GRADIENTS, *(["entropy_N"] if entropy else [])):
        wanted = getattr(exact, name)
        allowed = 3 * error(getattr(single, name), wanted) + 2 * cost.get(name, 0.0) + 2e-7 * float(wanted.norm())
        assert error(getattr(answer, name), wanted) <= allowed, name


def cost_of_fp32_lse(problem: Problem, exact: Answer, softcap: float | None) -> dict[str, float]:
    """What gradients lose, everything else exact, where a probability is exp(logit - lse) with an lse kept in fp32.

    Half a spacing of fp32 numbers near the lse, relative to each probability: a dense softmax never has this error.
    """
    spacing_N = torch.nextafter(exact.lse_N.float(), torch.tensor(torch.inf)).double() - exact.lse_N.float().double()
    product_NV = (problem.hidden_NH @ problem.weight_VH.t()).requires_grad_()
    logits_NV = dense_logits(product_NV, problem.bias_V, temperature=1.0, scale=1.0, softcap=softcap)
    off_NV = (logits_NV - exact.lse_N[:, None]).exp() * (problem.upstream_N * spacing_N / 2)[:, None]
    (off_NV,) = torch.autograd.grad(logits_NV, product_NV, off_NV.detach())
    off = {
        "grad_NH": off_NV @ problem.weight_VH,
        "grad_VH": off_NV.t() @ problem.hidden_NH,
        "grad_V": off_NV.sum(dim=0),
    }
    return {name: float(one.norm()) for name, one in off.items()}


@pytest.mark.parametrize(("form", "entropy"), [(form, False) for form in FORMS] + [("recompute", True)])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_inputs_lose_no_more_than_rounding_the_result(form, entropy, dtype):
    problem = make_problem(40, 300, scale=2, bias=True).rounded(dtype)
    exact, single = solve(problem, entropy=entropy), solve(problem, entropy=entropy, dtype=torch.float32)
    shard, cfg = whole(problem, padding=0, tile=64), HeadConfig(chunk_tokens=16)
    lse_N = exact.lse_N.float()
    answer = call(problem, form, shard, cfg=cfg, dtype=dtype, lse_N=lse_N, entropy=entropy).answer()
    for name in ("logp_N", "lse_N", *(["entropy_N"] if entropy else [])):
        mine = getattr(answer, name)
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, getattr(exact, name).float(), rtol=2e-6, atol=2e-6)
    for name in GRADIENTS:
        mine, wanted = getattr(answer, name), getattr(exact, name)
        assert mine.dtype == dtype
        rounded = getattr(single, name).to(dtype)
        assert error(mine, wanted) <= 1.01 * error(rounded, wanted), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("chunk", "rows"), [(40, 300), (16, 300), (40, 64), (16, 64)])
def test_narrow_gradients_lose_no_more_than_dense_narrow_products(form, dtype, chunk, rows):
    """The logits' gradient is rounded once and each product's result once.

    In one block that is the dense computation with these two roundings. A product that is cut into blocks is rounded
    block by block, and the sum, which is fp32, once more; the dense computation that is cut alike bounds that one.
    """
    problem = make_problem(40, 300, scale=2, bias=True).rounded(dtype)
    entropy = form == "recompute"
    exact = solve(problem, entropy=entropy)
    shard = whole(problem, padding=0, tile=rows)
    narrow, wide = (HeadConfig(chunk_tokens=chunk, low_precision_grad=choice) for choice in (True, False))
    lse_N = call(problem, "recompute", shard, cfg=wide, dtype=dtype).logp.lse_N
    mine = call(problem, form, shard, cfg=narrow, dtype=dtype, lse_N=lse_N, entropy=entropy).answer()
    precise = call(problem, form, shard, cfg=wide, dtype=dtype, lse_N=lse_N, entropy=entropy).answer()
    assert torch.equal(mine.logp_N, precise.logp_N) and torch.equal(mine.grad_V, precise.grad_V)
    dense = dict(zip(("grad_NH", "grad_VH"), narrow_dense(problem, dtype, chunk, rows, entropy=entropy), strict=True))
    for name, theirs in dense.items():
        got, wanted = getattr(mine, name), getattr(exact, name)
        assert got.dtype == dtype
        assert error(got, wanted) <= 1.01 * error(theirs, wanted), name


def narrow_dense(
    problem: Problem, dtype: torch.dtype, chunk: int, rows: int, *, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dH, dW) of dense fp32 logits whose gradient is rounded, by products of blocks that are rounded too."""
    hidden_NH, weight_VH = problem.hidden_NH.float(), problem.weight_VH.float()
    product_NV = (hidden_NH @ weight_VH.t()).requires_grad_()
    bias_V = None if problem.bias_V is None else problem.bias_V.float()
    logits_NV = dense_logits(product_NV, bias_V, temperature=1.0, scale=1.0, softcap=None)
    (grad_NV,) = torch.autograd.grad(objective(problem, logits_NV, entropy=entropy)[0], product_NV)
    grad_NV = grad_NV.to(dtype).float()
    grad_NH, grad_VH = torch.zeros_like(hidden_NH), torch.zeros_like(weight_VH)
    for start in range(0, len(hidden_NH), chunk):
        for first in range(0, len(weight_VH), rows):
            part, tile = slice(start, start + chunk), slice(first, first + rows)
            block_CR = grad_NV[part, tile]
            grad_NH[part] += (block_CR @ weight_VH[tile]).to(dtype).float()
            grad_VH[tile] += (block_CR.t() @ hidden_NH[part]).to(dtype).float()
    return grad_NH.to(dtype), grad_VH.to(dtype)


@pytest.mark.parametrize("form", FORMS)
def test_narrow_gradients_are_for_narrow_inputs_alone(form):
    problem = make_problem(9, 20)
    exact = solve(problem)
    shard, lse_N = whole(problem, padding=0), exact.lse_N.float()
    wide, narrow = (
        call(problem, form, shard, cfg=HeadConfig(low_precision_grad=choice), dtype=torch.float32, lse_N=lse_N).answer()
        for choice in (False, True)
    )
    assert torch.equal(wide.grad_NH, narrow.grad_NH) and torch.equal(wide.grad_VH, narrow.grad_VH)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("low_precision_grad", [None, True])
@pytest.mark.parametrize("fits", [True, False])
def test_products_of_others_stay_as_precise_as_they_were(form, low_precision_grad, fits):
    matmul = torch.backends.mkldnn.matmul
    problem = make_problem(9, 20)
    lse_N = solve(problem).lse_N.float()
    cfg, before = HeadConfig(low_precision_grad=low_precision_grad), matmul.fp32_precision
    if not fits:
        problem.weight_VH = problem.weight_VH[:, 1:]
    try:
        matmul.fp32_precision = "ieee"
        with nullcontext() if fits else pytest.raises(RuntimeError, match="shapes"):
            call(problem, form, whole(problem), cfg=cfg, dtype=torch.bfloat16, lse_N=lse_N).answer()
        assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("low_precision_grad", [None, True])
def test_few_tokens_in_half_precision(num_tokens, form, low_precision_grad):
    problem = make_problem(num_tokens, 20, bias=True).rounded(torch.bfloat16)
    exact = solve(problem)
    cfg, shard = HeadConfig(low_precision_grad=low_precision_grad), whole(problem, padding=0)
    answer = call(problem, form, shard, cfg=cfg, dtype=torch.bfloat16, lse_N=exact.lse_N.float()).answer()
    assert_same(answer, exact, tolerance=0.02)


def peaked(base: float, gap: float, place: int) -> tuple[Answer, torch.Tensor]:
    """(dense answer, weight) of logits `base`, `base - gap` at `place`, and 63 - 1 that count for nothing."""
    weight_VH = torch.full((64, 1), base - gap - 60.0)
    weight_VH[0], weight_VH[place] = base, base - gap
    one_N = torch.ones(1, dtype=torch.float64)
    problem = Problem(one_N[:, None], weight_VH.double(), torch.zeros(1, dtype=torch.int64), one_N, one_N)
    return solve(problem, entropy=True), weight_VH


@pytest.mark.parametrize("base", [0.0, 100.0, -100.0, 1000.0])
@pytest.mark.parametrize("place", [1, 40], ids=["one tile", "two tiles"])
def test_entropy_of_a_peaked_distribution(base, place):
    # The entropy is near p (1 + gap) with p = exp(-gap). fp32 logits fix p to their spacing; of p, the sum 1 + p keeps
    # what its rounding to 2 ** -23 leaves. Nothing else may be lost, however large log-sum-exps are.
    for gap in (1.0, 3.0, 6.0, 9.0, 12.0, 15.0, 20.0, 60.0):
        exact, weight_VH = peaked(base, gap, place)
        assert exact.entropy_N is not None
        for tile in (2, 16, 64):
            shard = VocabShard(0, 64, 64, tile=tile)
            done = linear_logp(torch.ones(1, 1), weight_VH, torch.zeros(1, dtype=torch.int64), shard, entropy=True)
            assert done.entropy_N is not None and done.entropy_N.item() >= 0
            share = max(1.0, abs(base)) * 2**-23
            expected = pytest.approx(exact.entropy_N.item(), rel=share, abs=2**-23)
            assert done.entropy_N.item() == expected, (gap, tile)


def test_entropy_of_equal_logits_is_the_log_of_their_number():
    for base in (0.0, 1000.0):
        shard = VocabShard(0, 48, 48, tile=16)
        weight_VH, target_N = torch.full((48, 1), base), torch.zeros(1, dtype=torch.int64)
        done = linear_logp(torch.ones(1, 1), weight_VH, target_N, shard, entropy=True, accuracy=True)
        torch.testing.assert_close(done.entropy_N, torch.tensor([48.0]).log(), rtol=2**-14 if base else 2**-20, atol=0)
        assert done.correct_N.item()
