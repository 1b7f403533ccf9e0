"""Log-probs from hidden states and a head on one process, against a dense float64 computation."""

from __future__ import annotations

import pytest
import torch
from slow_logp import Answer, Problem, make_problem, padded_rows, solve

from megalign.ops.linear_logp import linear_logp, weighted_logp
from megalign.ops.vocab import VocabShard

FORMS = ("recompute", "weighted", "given lse")


def run(
    problem: Problem, form: str, *, dtype=torch.float64, padding: int = 3, lse_T=None, upstream: float = 1.0, **options
):
    """What one form makes of a problem, as an `Answer` (padding rows of dW included), lse where the form gives it."""
    vocab = len(problem.weight_VH)
    shard = VocabShard(0, vocab + padding, vocab)
    hidden_TH = problem.hidden_TH.to(dtype, copy=True).requires_grad_()
    weight_VH = padded_rows(problem.weight_VH, shard).to(dtype).requires_grad_()
    if form == "recompute":
        logp_T, lse_T = linear_logp(hidden_TH, weight_VH, problem.target_T, shard, **options)
        (logp_T * problem.upstream_T.to(logp_T.dtype)).sum().backward()
    else:
        given = lse_T if form == "given lse" else None
        value, logp_T = weighted_logp(
            hidden_TH, weight_VH, problem.target_T, problem.upstream_T * upstream, shard, lse_T=given, **options
        )
        torch.testing.assert_close(value, (logp_T * (problem.upstream_T * upstream).to(logp_T.dtype)).sum())
        (value / upstream).backward()
    return Answer(logp_T.detach(), lse_T, hidden_TH.grad, weight_VH.grad)


def solve_logp(problem: Problem, *, temperature: float) -> torch.Tensor:
    """Log-probs by the weighted form itself, whose value its gradient must belong to."""
    vocab = len(problem.weight_VH)
    with torch.no_grad():
        return weighted_logp(
            problem.hidden_TH,
            problem.weight_VH,
            problem.target_T,
            problem.upstream_T,
            VocabShard(0, vocab, vocab),
            temperature=temperature,
        )[1]


def assert_same(answer: Answer, dense: Answer, *, tolerance: float) -> None:
    vocab = len(dense.grad_VH)
    for mine, theirs in (
        (answer.logp_T, dense.logp_T),
        (answer.grad_TH, dense.grad_TH),
        (answer.grad_VH[:vocab], dense.grad_VH),
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)
    assert not answer.grad_VH[vocab:].any(), "a padding row got a gradient"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_dense_logits(form, chunk, temperature):
    problem = make_problem(11, 13, borders=(0, 12))
    dense = solve(problem, temperature=temperature)
    answer = run(problem, form, lse_T=dense.lse_T, chunk_tokens=chunk, temperature=temperature)
    assert_same(answer, dense, tolerance=1e-12)
    if form == "recompute":
        torch.testing.assert_close(answer.lse_T, dense.lse_T, rtol=1e-12, atol=1e-12)


def test_gradcheck_of_every_log_prob():
    problem = make_problem(5, 9)
    shard = VocabShard(0, 9, 9)

    def logp(hidden_TH, weight_VH):
        return linear_logp(hidden_TH, weight_VH, problem.target_T, shard, temperature=0.8, chunk_tokens=2)[0]

    assert torch.autograd.gradcheck(logp, (problem.hidden_TH.requires_grad_(), problem.weight_VH.requires_grad_()))


def test_weighted_sum_by_finite_differences():
    # not gradcheck, which runs backward many times: the formed gradient is scaled in place and serves once
    problem = make_problem(3, 5)
    answer = run(problem, "weighted", padding=0, temperature=0.8, chunk_tokens=2)

    def value() -> float:
        return float((solve_logp(problem, temperature=0.8) * problem.upstream_T).sum())

    for name, gradient in (("hidden_TH", answer.grad_TH), ("weight_VH", answer.grad_VH)):
        flat = getattr(problem, name).view(-1)
        for place in range(len(flat)):
            sides = []
            for shift in (1e-5, -2e-5):
                flat[place] += shift
                sides.append(value())
            flat[place] += 1e-5
            assert gradient.view(-1)[place].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_token_and_one_token(form, num_tokens):
    problem = make_problem(num_tokens, 6)
    dense = solve(problem)
    assert_same(run(problem, form, lse_T=dense.lse_T), dense, tolerance=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_huge_logits_stay_finite_and_exact(form):
    # Logits of some hundreds: exp overflows float32 unless the largest is taken off first.
    problem = make_problem(20, 50, scale=30)
    dense = solve(problem)
    assert dense.lse_T.max() > 100
    # the lse of a float32 pass over these logits, as a two-pass step has it: their common rounding cancels
    lse_T = run(problem, "recompute", dtype=torch.float32).lse_T
    answer = run(problem, form, dtype=torch.float32, lse_T=lse_T, chunk_tokens=7)
    single = solve(problem, dtype=torch.float32)
    for name in ("logp_T", "grad_TH", "grad_VH"):
        exact, plain, mine = (getattr(one, name).double() for one in (dense, single, answer))
        error = (mine[: len(exact)] - exact).norm()
        assert error <= 3 * (plain - exact).norm() + 2e-6 * exact.norm(), name


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_inputs_lose_no_more_than_rounding_the_result(form):
    problem = make_problem(40, 300, scale=2)
    problem.hidden_TH, problem.weight_VH = problem.hidden_TH.bfloat16().double(), problem.weight_VH.bfloat16().double()
    exact, single = solve(problem), solve(problem, dtype=torch.float32)
    answer = run(problem, form, dtype=torch.bfloat16, lse_T=exact.lse_T.float(), chunk_tokens=16)
    assert answer.logp_T.dtype == torch.float32
    torch.testing.assert_close(answer.logp_T, exact.logp_T.float(), rtol=1e-5, atol=1e-5)
    for name in ("grad_TH", "grad_VH"):
        wanted = getattr(exact, name)
        rounded, mine = getattr(single, name).bfloat16().double(), getattr(answer, name)[: len(wanted)]
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - wanted).norm() <= 1.01 * (rounded - wanted).norm(), name


@pytest.mark.parametrize("form", FORMS)
def test_frozen_head_gets_no_gradient(form):
    problem = make_problem(8, 10)
    dense = solve(problem)
    shard = VocabShard(0, 10, 10)
    hidden_TH = problem.hidden_TH.requires_grad_()
    if form == "recompute":
        logp_T, _ = linear_logp(hidden_TH, problem.weight_VH, problem.target_T, shard, chunk_tokens=3)
        (logp_T * problem.upstream_T).sum().backward()
    else:
        lse_T = dense.lse_T if form == "given lse" else None
        coefficient_T = problem.upstream_T
        weighted_logp(
            hidden_TH, problem.weight_VH, problem.target_T, coefficient_T, shard, lse_T=lse_T, chunk_tokens=3
        )[0].backward()
    torch.testing.assert_close(hidden_TH.grad, dense.grad_TH, rtol=1e-12, atol=1e-12)
    assert problem.weight_VH.grad is None


@pytest.mark.parametrize("form", ["weighted", "given lse"])
def test_upstream_gradient_scales_what_was_formed_forward(form):
    problem = make_problem(6, 10)
    dense = solve(problem)
    assert_same(run(problem, form, lse_T=dense.lse_T, upstream=4.0), dense, tolerance=1e-12)


def test_log_probs_are_the_same_with_and_without_gradient():
    problem = make_problem(9, 12)
    shard = VocabShard(0, 12, 12)
    arguments = (problem.hidden_TH.float().requires_grad_(), problem.weight_VH.float(), problem.target_T, shard)
    with torch.no_grad():
        scored = linear_logp(*arguments, chunk_tokens=4)
    trained = linear_logp(*arguments, chunk_tokens=4)
    weighted = weighted_logp(*arguments[:3], problem.upstream_T, shard, lse_T=scored[1], chunk_tokens=4)[1]
    assert torch.equal(scored[0], trained[0]) and torch.equal(scored[1], trained[1])
    assert torch.equal(scored[0], weighted), "a two-pass step would see a gap"
