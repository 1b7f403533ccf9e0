"""Log-probs from hidden states and a head on one process, against a dense float64 computation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalign.ops import head_blocks
from megalign.ops.head_blocks import HeadConfig
from megalign.ops.hidden_rows import TokenShard
from megalign.ops.linear_logp import linear_logp, weighted_logp
from tests.support.head_calls import FORMS, assert_same, call, own_part, whole
from tests.support.slow_logp import make_problem, solve

HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "everything": {"temperature": 0.7, "scale": 1.3, "softcap": 3.0},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("bias", [False, True])
def test_equals_dense_logits(form, head, bias):
    problem = make_problem(11, 13, borders=(0, 12, 4, 5), bias=bias)
    entropy = form == "recompute"
    dense = solve(problem, **head, entropy=entropy)
    for tile in (None, 1, 5, 13, 100):
        shard = whole(problem, tile=tile)
        expected = own_part(dense, shard, None, form=form, target_N=problem.target_N)
        for chunk in (1, 4, 11, 100, None):
            cfg = HeadConfig(**head, chunk_tokens=chunk)
            answer = call(problem, form, shard, cfg=cfg, lse_N=dense.lse_N, entropy=entropy, accuracy=True).answer()
            assert (answer.entropy_N is None, answer.correct_N is None) == (not entropy, form == "given lse")
            assert_same(answer, expected, tolerance=1e-12, note=f"tile {tile} chunk {chunk}")


@pytest.mark.parametrize("form", ["weighted", "given lse"])
def test_value_is_the_weighted_sum(form):
    problem = make_problem(11, 13)
    dense = solve(problem)
    done = call(problem, form, whole(problem), lse_N=dense.lse_N)
    torch.testing.assert_close(done.value.detach(), (dense.logp_N * problem.upstream_N).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("head", [{}, {"temperature": 0.8, "scale": 1.2, "softcap": 2.5}])
def test_gradcheck_of_every_log_prob_and_entropy(head):
    problem = make_problem(5, 9, bias=True)
    cfg, shard = HeadConfig(**head, chunk_tokens=2), whole(problem, padding=0, tile=4)

    def values(hidden_NH, weight_VH, bias_V):
        done = linear_logp(hidden_NH, weight_VH, problem.target_N, shard, bias_V=bias_V, cfg=cfg, entropy=True)
        return done.logp_N, done.entropy_N

    inputs = tuple(one.requires_grad_() for one in (problem.hidden_NH, problem.weight_VH, problem.bias_V))
    assert torch.autograd.gradcheck(values, inputs)


@pytest.mark.parametrize("softcap", [None, 2.5])
def test_weighted_sum_by_finite_differences(softcap):
    # not gradcheck, which runs backward many times: the formed gradient is scaled in place and serves once
    problem = make_problem(3, 5, bias=True)
    cfg, shard = HeadConfig(temperature=0.8, softcap=softcap, chunk_tokens=2), whole(problem, padding=0, tile=2)
    answer = call(problem, "weighted", shard, cfg=cfg).answer()

    def value() -> float:
        return call(problem, "weighted", shard, cfg=cfg).value.item()

    for name, gradient in (("hidden_NH", answer.grad_NH), ("weight_VH", answer.grad_VH), ("bias_V", answer.grad_V)):
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
    problem = make_problem(num_tokens, 6, bias=True)
    entropy = form == "recompute"
    dense = solve(problem, entropy=entropy)
    shard = whole(problem)
    answer = call(problem, form, shard, lse_N=dense.lse_N, entropy=entropy, accuracy=True).answer()
    assert_same(answer, own_part(dense, shard, None, form=form, target_N=problem.target_N), tolerance=1e-12)
    assert len(answer.logp_N) == len(answer.grad_NH) == num_tokens


def test_entropy_alone_has_a_gradient():
    problem = make_problem(6, 10)
    dense = solve(replace(problem, upstream_N=torch.zeros(6, dtype=torch.float64)), entropy=True)
    hidden_NH = problem.hidden_NH.clone().requires_grad_()
    done = linear_logp(hidden_NH, problem.weight_VH, problem.target_N, whole(problem, padding=0), entropy=True)
    (done.entropy_N * problem.entropy_upstream_N).sum().backward()
    torch.testing.assert_close(hidden_NH.grad, dense.grad_NH, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(form, trained):
    problem = make_problem(8, 10, bias=True)
    dense = solve(problem)
    leaves = {"hidden": problem.hidden_NH, "weight": problem.weight_VH, "bias": problem.bias_V}
    leaves[trained].requires_grad_()
    shared = {"bias_V": problem.bias_V, "cfg": HeadConfig(chunk_tokens=3)}
    arguments = (problem.hidden_NH, problem.weight_VH, problem.target_N)
    shard = whole(problem, padding=0)
    if form == "recompute":
        value = (linear_logp(*arguments, shard, **shared).logp_N * problem.upstream_N).sum()
    else:
        lse_N = dense.lse_N if form == "given lse" else None
        value, _ = weighted_logp(*arguments, problem.upstream_N, shard, lse_N=lse_N, **shared)
    value.backward()
    expected = {"hidden": dense.grad_NH, "weight": dense.grad_VH, "bias": dense.grad_V}[trained]
    torch.testing.assert_close(leaves.pop(trained).grad, expected, rtol=1e-12, atol=1e-12)
    assert all(leaf.grad is None for leaf in leaves.values())


@pytest.mark.parametrize("form", ["weighted", "given lse"])
def test_upstream_gradient_scales_what_was_formed_forward(form):
    problem = make_problem(6, 10, bias=True)
    dense = solve(problem)
    scaled = solve(replace(problem, upstream_N=problem.upstream_N * 0.25))
    done = call(problem, form, whole(problem), lse_N=dense.lse_N)
    done.value = done.value * 0.25
    expected = own_part(scaled, whole(problem), None, form=form, target_N=problem.target_N)
    assert_same(done.answer(), expected, tolerance=1e-12)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_are_the_same_to_the_bit_in_every_form(softcap, dtype):
    problem = make_problem(23, 30, scale=2, bias=True)
    cfg, shard = HeadConfig(temperature=0.9, softcap=softcap, chunk_tokens=5), whole(problem, tile=8)
    with torch.no_grad():
        scored = call(problem, "recompute", shard, cfg=cfg, dtype=dtype).logp
    for entropy in (False, True):
        trained = call(problem, "recompute", shard, cfg=cfg, dtype=dtype, entropy=entropy, accuracy=entropy).logp
        assert torch.equal(scored.lse_N, trained.lse_N) and torch.equal(scored.logp_N, trained.logp_N)
    for form in ("weighted", "given lse"):
        weighted = call(problem, form, shard, cfg=cfg, dtype=dtype, lse_N=scored.lse_N, accuracy=True).logp
        assert torch.equal(scored.lse_N, weighted.lse_N), form
        assert torch.equal(scored.logp_N, weighted.logp_N), f"{form}: a two-pass step would see a gap"


@pytest.mark.parametrize("form", ["weighted", "given lse"])
def test_weighted_without_gradients_gives_the_values(form):
    problem = make_problem(6, 10)
    dense = solve(problem)
    with torch.no_grad():
        done = call(problem, form, whole(problem), lse_N=dense.lse_N)
    assert not done.value.requires_grad
    torch.testing.assert_close(done.logp.logp_N, dense.logp_N, rtol=1e-12, atol=1e-12)


def test_only_what_has_a_gradient_asks_for_one():
    problem = make_problem(6, 10)
    done = call(problem, "recompute", whole(problem), entropy=True, accuracy=True).logp
    assert done.logp_N.requires_grad and done.entropy_N.requires_grad
    assert not done.lse_N.requires_grad and not done.correct_N.requires_grad
    for form in ("weighted", "given lse"):
        weighted = call(problem, form, whole(problem), lse_N=done.lse_N)
        assert weighted.value.requires_grad
        assert not weighted.logp.logp_N.requires_grad and not weighted.logp.lse_N.requires_grad


@pytest.mark.parametrize("form", ["recompute", "weighted"])
def test_a_tie_counts_as_correct(form):
    # rows 1 and 4 are the same token's worth, in different tiles; row 2 is less likely than both
    problem = make_problem(3, 6)
    problem.hidden_NH[:] = 1.0
    problem.weight_VH[:] = torch.tensor([0.0, 2.0, 1.0, 0.0, 2.0, 0.0], dtype=torch.float64)[:, None]
    problem.target_N[:] = torch.tensor([1, 2, 4])
    done = call(problem, form, whole(problem, tile=2), dtype=torch.float32, accuracy=True)
    assert done.logp.correct_N.tolist() == [True, False, True]


@pytest.mark.parametrize("form", FORMS)
def test_one_rank_that_holds_all_tokens_may_say_so(form):
    problem = make_problem(7, 10)
    dense = solve(problem)
    answer = call(problem, form, whole(problem), lse_N=dense.lse_N, tokens=TokenShard((7,), 0)).answer()
    assert_same(answer, own_part(dense, whole(problem), None, form=form, target_N=problem.target_N), tolerance=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_hidden_states_that_do_not_lie_in_rows(form):
    problem = make_problem(7, 10)
    dense = solve(problem)
    shard = whole(problem, padding=0)
    hidden_NH = problem.hidden_NH.t().contiguous().t().requires_grad_()
    assert not hidden_NH.is_contiguous()
    if form == "recompute":
        value = (linear_logp(hidden_NH, problem.weight_VH, problem.target_N, shard).logp_N * problem.upstream_N).sum()
    else:
        lse_N = dense.lse_N if form == "given lse" else None
        value, _ = weighted_logp(hidden_NH, problem.weight_VH, problem.target_N, problem.upstream_N, shard, lse_N=lse_N)
    value.backward()
    torch.testing.assert_close(hidden_NH.grad, dense.grad_NH, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.numel())
        return result


@pytest.mark.parametrize("form", FORMS)
def test_no_tensor_is_larger_than_a_block(form):
    # 64 tokens, 3 hidden, 512 rows: blocks of 8 x 128, dW of 1536 numbers; all logits would be 32768
    problem = make_problem(64, 512, hidden=3, bias=True)
    lse_N = solve(problem).lse_N
    with Largest() as largest:
        done = call(
            problem,
            form,
            whole(problem, padding=0, tile=128),
            cfg=HeadConfig(chunk_tokens=8, softcap=4.0),
            lse_N=lse_N,
            entropy=True,
        )
        done.answer()
    assert largest.numel == 512 * 3


def test_accuracy_with_a_given_lse_is_refused():
    problem = make_problem(3, 5)
    with pytest.raises(ValueError, match="accuracy needs a pass without lse_N"):
        weighted_logp(
            problem.hidden_NH,
            problem.weight_VH,
            problem.target_N,
            problem.upstream_N,
            whole(problem),
            lse_N=torch.zeros(3, dtype=torch.float64),
            accuracy=True,
        )


@pytest.mark.parametrize("bias", [False, True])
def test_known_coefficients_where_a_chunk_over_the_vocabulary_is_too_much_to_keep(monkeypatch, bias):
    problem = make_problem(20, 13, borders=(0, 12), bias=bias)
    dense, shard = solve(problem), whole(problem, tile=5)
    expected = own_part(dense, shard, None, form="weighted", target_N=problem.target_N)
    small = replace(head_blocks.BLOCK_SIZES["cpu"], kept_bytes=1)
    monkeypatch.setitem(head_blocks.BLOCK_SIZES, "cpu", small)
    blocks = head_blocks.HeadBlocks(torch.float64, problem.weight_VH, problem.bias_V, shard, HeadConfig())
    assert not blocks.keeps_logits(20)
    assert_same(call(problem, "weighted", shard, accuracy=True).answer(), expected, tolerance=1e-12)
