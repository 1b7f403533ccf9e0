"""dW straight into Megatron's fp32 `main_grad`, on one process.

Axes: N tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalign.ops.head_blocks import HeadConfig
from megalign.ops.linear_logp import linear_logp, weighted_logp
from megalign.ops.vocab import VocabShard
from megalign.ops.weight_grad import main_grad_sink
from tests.support.head_calls import FORMS
from tests.support.slow_logp import Problem, make_problem, solve

CHUNKS = HeadConfig(chunk_tokens=3)
SHARD = VocabShard(0, 10, 10, tile=4)


def parameter(problem: Problem, *, dtype=torch.float32, main_dtype=torch.float32) -> torch.nn.Parameter:
    """A weight as Megatron's DDP leaves it before the first micro-batch."""
    weight_VH = torch.nn.Parameter(problem.weight_VH.to(dtype))
    weight_VH.main_grad = torch.zeros_like(problem.weight_VH, dtype=main_dtype)
    weight_VH.grad_added_to_main_grad = False
    return weight_VH


def value_of(
    problem: Problem, form: str, weight_VH: Tensor, *, hidden_NH: Tensor | None = None, asked: bool = True
) -> Tensor:
    """A form's weighted sum of log-probs, ready for backward."""
    hidden_NH = problem.hidden_NH.to(weight_VH.dtype).requires_grad_() if hidden_NH is None else hidden_NH
    upstream_N, sink = problem.upstream_N.float(), main_grad_sink(weight_VH) if asked else None
    if form == "recompute":
        found = linear_logp(hidden_NH, weight_VH, problem.target_N, SHARD, cfg=CHUNKS, sink=sink)
        return (found.logp_N * upstream_N).sum()
    lse_N = solve(problem).lse_N.float() if form == "given lse" else None
    arguments = (hidden_NH, weight_VH, problem.target_N, upstream_N, SHARD)
    return weighted_logp(*arguments, lse_N=lse_N, cfg=CHUNKS, sink=sink)[0]


def assert_close(mine: Tensor, exact: Tensor) -> None:
    assert (mine.double() - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_add_up_in_main_grad_in_fp32(form, dtype):
    first, second = (make_problem(8, 10, seed=seed).rounded(dtype) for seed in (1, 2))
    second.weight_VH = first.weight_VH
    weight_VH = parameter(first, dtype=dtype)
    main_VH = weight_VH.main_grad
    value_of(first, form, weight_VH).backward()
    assert_close(main_VH, solve(first).grad_VH)
    assert weight_VH.grad_added_to_main_grad is True
    value_of(second, form, weight_VH).backward()
    assert weight_VH.main_grad is main_VH, "the buffer is Megatron's own"
    assert_close(main_VH, solve(first).grad_VH + solve(second).grad_VH)


@pytest.mark.parametrize("form", FORMS)
def test_the_visible_gradient_is_a_stand_in_without_memory(form):
    problem = make_problem(8, 10)
    weight_VH = parameter(problem)
    value_of(problem, form, weight_VH).backward()
    assert weight_VH.grad.shape == weight_VH.shape and weight_VH.grad.dtype == weight_VH.dtype
    assert weight_VH.grad.untyped_storage().nbytes() == weight_VH.element_size()
    assert not weight_VH.grad.any()


@pytest.mark.parametrize("form", FORMS)
def test_no_stand_in_where_the_visible_gradient_counts(form):
    problem = make_problem(8, 10)
    weight_VH = parameter(problem)
    weight_VH.zero_out_wgrad = True
    value_of(problem, form, weight_VH).backward()
    assert weight_VH.grad is None and weight_VH.grad_added_to_main_grad
    assert_close(weight_VH.main_grad, solve(problem).grad_VH)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [False, True])
def test_megatrons_hook_ends_with_the_whole_gradient(form, tied):
    # What Megatron-Core's DDP does on the weight's gradient accumulator, for its own and for tied embeddings.
    problem = make_problem(8, 10)
    weight_VH = parameter(problem)
    weight_VH.zero_out_wgrad = tied
    accumulator = weight_VH.expand_as(weight_VH).grad_fn.next_functions[0][0]
    fired = []

    def hook(*unused):
        fired.append(weight_VH.grad is not None)
        added = weight_VH.grad_added_to_main_grad and not weight_VH.zero_out_wgrad
        if weight_VH.grad is not None and not added:
            weight_VH.main_grad.add_(weight_VH.grad)
        weight_VH.grad = None

    accumulator.register_hook(hook)
    ids_N = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    leaf_VH = problem.weight_VH.clone().requires_grad_()
    dense_NH = leaf_VH[ids_N] if tied else problem.hidden_NH
    logp_N = (dense_NH @ leaf_VH.t()).log_softmax(dim=1).gather(1, problem.target_N[:, None]).squeeze(1)
    (logp_N * problem.upstream_N).sum().backward()
    problem.hidden_NH = dense_NH.detach()
    value_of(problem, form, weight_VH, hidden_NH=weight_VH[ids_N] if tied else None).backward()
    assert fired == [True] and weight_VH.grad is None
    assert_close(weight_VH.main_grad, leaf_VH.grad)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("why", ["bf16 main_grad", "not asked for", "no main_grad"])
def test_where_it_does_not_fit_autograd_gets_the_gradient(form, why):
    problem = make_problem(8, 10)
    weight_VH = parameter(problem, main_dtype=torch.bfloat16 if why == "bf16 main_grad" else torch.float32)
    if why == "no main_grad":
        del weight_VH.main_grad
    value = value_of(problem, form, weight_VH, asked=why != "not asked for")
    (value * 2).backward()
    assert_close(weight_VH.grad, 2 * solve(problem).grad_VH)
    assert not weight_VH.grad_added_to_main_grad
    assert why == "no main_grad" or not weight_VH.main_grad.any()


@pytest.mark.parametrize("form", ["weighted", "given lse"])
def test_an_upstream_gradient_that_comes_too_late_is_an_error(form):
    problem = make_problem(8, 10)
    value = value_of(problem, form, parameter(problem))
    with pytest.raises(RuntimeError, match="must be 1"):
        (value * 2).backward()


def test_the_recompute_form_takes_any_upstream_gradient():
    problem = make_problem(8, 10)
    weight_VH = parameter(problem)
    (value_of(problem, "recompute", weight_VH) * 2).backward()
    assert_close(weight_VH.main_grad, 2 * solve(problem).grad_VH)


@pytest.mark.parametrize("form", FORMS)
def test_a_pass_without_gradients_leaves_main_grad_alone(form):
    problem = make_problem(8, 10)
    weight_VH = parameter(problem)
    with torch.no_grad():
        value_of(problem, form, weight_VH)
    assert not weight_VH.main_grad.any()
    assert not weight_VH.grad_added_to_main_grad and weight_VH.grad is None


@pytest.mark.parametrize("form", FORMS)
def test_a_frozen_weight_leaves_main_grad_alone(form):
    problem = make_problem(8, 10)
    weight_VH = parameter(problem).requires_grad_(False)
    hidden_NH = problem.hidden_NH.float().requires_grad_()
    value = value_of(problem, form, weight_VH, hidden_NH=hidden_NH)
    (value * 1).backward()
    assert_close(hidden_NH.grad, solve(problem).grad_NH)
    assert not weight_VH.main_grad.any() and not weight_VH.grad_added_to_main_grad


@pytest.mark.parametrize("form", FORMS)
def test_a_bias_keeps_a_gradient_of_its_own(form):
    problem = make_problem(8, 10, bias=True)
    weight_VH, bias_V = parameter(problem), torch.nn.Parameter(problem.bias_V.float())
    dense = solve(problem)
    hidden_NH, upstream_N = problem.hidden_NH.float().requires_grad_(), problem.upstream_N.float()
    arguments, sink = (hidden_NH, weight_VH, problem.target_N), main_grad_sink(weight_VH)
    if form == "recompute":
        value = (linear_logp(*arguments, SHARD, bias_V=bias_V, cfg=CHUNKS, sink=sink).logp_N * upstream_N).sum()
    else:
        lse_N = dense.lse_N.float() if form == "given lse" else None
        value, _ = weighted_logp(*arguments, upstream_N, SHARD, lse_N=lse_N, bias_V=bias_V, cfg=CHUNKS, sink=sink)
    value.backward()
    assert_close(weight_VH.main_grad, dense.grad_VH)
    assert_close(bias_V.grad, dense.grad_V)


class Buffer:
    """A sink of an engine whose weights are not parameters that the head sees."""

    def __init__(self, shape: torch.Size) -> None:
        self.sum_VH, self.calls = torch.zeros(shape), 0

    def added(self) -> None:
        self.calls += 1


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_may_be_released_after_forward(form):
    """As under ZeRO-3: the head keeps the gathered tensor, whatever becomes of the parameter that it came from."""
    problem = make_problem(8, 10)
    weight_VH = torch.nn.Parameter(problem.weight_VH.float())
    hidden_NH, sink = problem.hidden_NH.float().requires_grad_(), Buffer(weight_VH.shape)
    arguments, upstream_N = (hidden_NH, weight_VH.detach(), problem.target_N), problem.upstream_N.float()
    if form == "recompute":
        value = (linear_logp(*arguments, SHARD, cfg=CHUNKS, sink=sink).logp_N * upstream_N).sum()
    else:
        lse_N = solve(problem).lse_N.float() if form == "given lse" else None
        value, _ = weighted_logp(*arguments, upstream_N, SHARD, lse_N=lse_N, cfg=CHUNKS, sink=sink)
    weight_VH.data = torch.empty(0)
    value.backward()
    assert sink.calls == 1 and weight_VH.grad is None
    assert_close(sink.sum_VH, solve(problem).grad_VH)
    assert_close(hidden_NH.grad, solve(problem).grad_NH)
