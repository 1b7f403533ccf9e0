"""Log-probs over a vocabulary cut into shards, on gloo: the same numbers on every rank, and few collectives."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType

import pytest
import torch
import torch.distributed as dist
from slow_logp import Answer, make_problem, padded_rows, solve

from megalign.ops.linear_logp import linear_logp, weighted_logp
from megalign.ops.vocab import VocabShard
from megalign.runtime.distributed import process_group, spawn

# (vocabulary, rows a rank): 61 divides by neither 2 nor 4; the rows for 10 ids leave ranks with padding only.
VOCABULARIES = [(61, {1: 61, 2: 31, 4: 16}), (10, {1: 12, 2: 10, 4: 8})]
COLLECTIVE_WORDS = ("all_", "reduce", "gather", "scatter", "broadcast", "send", "recv", "barrier")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count calls of torch.distributed's collectives while they do their work."""
    calls: Counter[str] = Counter()
    plain = {
        name: function
        for name, function in vars(dist).items()
        if type(function) is FunctionType and any(word in name for word in COLLECTIVE_WORDS)
    }

    def counting(name):
        @functools.wraps(plain[name])
        def call(*args, **kwargs):
            calls[name] += 1
            return plain[name](*args, **kwargs)

        return call

    for name in plain:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)


def check_world() -> None:
    """Everything that needs this many ranks, in one job: start-up costs more than the checks."""
    with process_group(timeout_s=60) as world:
        for vocab, rows in VOCABULARIES:
            shard = VocabShard(world.rank * rows[world.size], rows[world.size], vocab, dist.group.WORLD)
            for num_tokens, chunk in ((0, 4), (1, 4), (13, 1), (13, 4), (13, 100)):
                for temperature in (1.0, 0.7):
                    check_values(shard, num_tokens, chunk, temperature)
            check_huge_logits(shard)
            check_partial_hidden_gradient(shard)
            check_collectives(shard)


def borders(shard: VocabShard) -> tuple[int, ...]:
    """First and last real id of every rank's rows."""
    edges = {0, shard.vocab_size - 1}
    for start in range(shard.size, shard.vocab_size, shard.size):
        edges |= {start - 1, start}
    return tuple(sorted(edges))


def call(problem, shard, form, lse_T, *, dtype=torch.float64, **options):
    """(what backward starts from, answer without gradients, leaves) of one form."""
    hidden_TH = problem.hidden_TH.detach().to(dtype).requires_grad_()
    weight_VH = padded_rows(problem.weight_VH, shard).to(dtype).requires_grad_()
    if form == "recompute":
        logp_T, lse_T = linear_logp(hidden_TH, weight_VH, problem.target_T, shard, **options)
        value = (logp_T * problem.upstream_T.to(dtype)).sum()
    else:
        given = lse_T if form == "given lse" else None
        value, logp_T = weighted_logp(
            hidden_TH, weight_VH, problem.target_T, problem.upstream_T, shard, lse_T=given, **options
        )
    return value, logp_T.detach(), lse_T, hidden_TH, weight_VH


def check_answer(dense: Answer, shard: VocabShard, form: str, result, target_T, *, tolerance: float) -> None:
    value, logp_T, lse_T, hidden_TH, weight_VH = result
    value.backward()
    expected_T = dense.logp_T
    if form == "given lse":
        owned_T, _ = shard.localize(target_T)
        expected_T = dense.logp_T.where(owned_T, -dense.lse_T)
    rows = padded_rows(dense.grad_VH, shard)
    rows[shard.num_real :] = 0
    for mine, theirs in (
        (logp_T, expected_T),
        (lse_T, dense.lse_T),
        (hidden_TH.grad, dense.grad_TH),
        (weight_VH.grad, rows),
    ):
        torch.testing.assert_close(
            mine.double(), theirs, rtol=tolerance, atol=tolerance, msg=lambda text: f"{form} {shard.start}: {text}"
        )


def check_values(shard: VocabShard, num_tokens: int, chunk: int, temperature: float) -> None:
    problem = make_problem(num_tokens, shard.vocab_size, borders=borders(shard))
    dense = solve(problem, temperature=temperature)
    for form in ("recompute", "weighted", "given lse"):
        result = call(problem, shard, form, dense.lse_T, chunk_tokens=chunk, temperature=temperature)
        check_answer(dense, shard, form, result, problem.target_T, tolerance=1e-11)


def check_huge_logits(shard: VocabShard) -> None:
    problem = make_problem(13, shard.vocab_size, scale=30, borders=borders(shard))
    dense = solve(problem)
    assert dense.lse_T.max() > 100, "exp would not overflow"
    # the lse of a float32 pass, as a two-pass step has it: the two passes' common rounding cancels
    lse_T = call(problem, shard, "recompute", None, dtype=torch.float32)[2]
    for form in ("recompute", "weighted", "given lse"):
        result = call(problem, shard, form, lse_T, dtype=torch.float32, chunk_tokens=5)
        check_answer(dense, shard, form, result, problem.target_T, tolerance=2e-3)


def check_partial_hidden_gradient(shard: VocabShard) -> None:
    """Without the reduction each rank holds its share: together they are the whole."""
    problem = make_problem(13, shard.vocab_size)
    dense = solve(problem)
    for form in ("recompute", "weighted", "given lse"):
        value, *_, hidden_TH, _ = call(problem, shard, form, dense.lse_T, reduce_hidden_grad=False)
        value.backward()
        shares = [torch.empty_like(hidden_TH.grad) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, hidden_TH.grad)
        torch.testing.assert_close(torch.stack(shares).sum(dim=0), dense.grad_TH, rtol=1e-11, atol=1e-11)


def check_collectives(shard: VocabShard) -> None:
    """One gather in the recompute form, one a chunk without lse, none with it; backward reduces dH once."""
    problem = make_problem(13, shard.vocab_size)
    lse_T = solve(problem).lse_T
    gathers = {"recompute": 1, "weighted": 4, "given lse": 0}  # 13 tokens in chunks of 4 are 4 chunks
    for form, number in gathers.items():
        for reduce in (True, False):
            with counted() as forward:
                value, *_ = call(problem, shard, form, lse_T, chunk_tokens=4, reduce_hidden_grad=reduce)
            with counted() as backward:
                value.backward()
            alone = dist.get_world_size() == 1
            assert forward == Counter({} if alone or not number else {"all_gather_into_tensor": number}), form
            assert backward == Counter({} if alone or not reduce else {"all_reduce": 1}), form
    with counted() as scoring, torch.no_grad():
        linear_logp(problem.hidden_TH, padded_rows(problem.weight_VH, shard), problem.target_T, shard, chunk_tokens=4)
    assert sum(scoring.values()) == (0 if dist.get_world_size() == 1 else 1)


def test_one_rank_takes_the_same_path_without_collectives():
    check_world()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_shards_give_the_dense_answer_with_few_collectives(num_ranks):
    spawn(check_world, num_ranks)
