"""Log-probs over a vocabulary cut into shards, on gloo: the same numbers on every rank, and few collectives.

Axes: N tokens, L of them on this rank, V this rank's rows of the vocabulary, H hidden.
"""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
import torch.distributed as dist

from megalign.ops.head_blocks import HeadConfig
from megalign.ops.hidden_rows import TokenShard
from megalign.ops.linear_logp import linear_logp
from megalign.ops.vocab import VocabShard
from megalign.runtime.distributed import World, process_group
from tests.support.collectives import counted, same_on_all_ranks
from tests.support.head_calls import FORMS, assert_same, call, error, own_part, own_rows
from tests.support.processes import run_ranks
from tests.support.slow_logp import HIDDEN, Answer, Problem, make_problem, padded, solve

# (vocabulary, rows of each rank by number of ranks)
SHARDS = {
    "no equal parts": (61, {1: (61,), 2: (31, 31), 4: (16, 16, 16, 16)}),
    "ranks of padding only": (10, {1: (12,), 2: (10, 10), 4: (8, 8, 8, 8)}),
    "uneven": (61, {1: (64,), 2: (20, 44), 4: (7, 30, 3, 24)}),
}
# Tokens of each rank, by number of ranks and of tokens; ranks without any, and runs that cross chunks.
TOKENS = {
    1: {0: [(0,)], 1: [(1,)], 13: [(13,)]},
    2: {0: [(0, 0)], 1: [(0, 1)], 13: [(5, 8), (13, 0)]},
    4: {0: [(0, 0, 0, 0)], 1: [(0, 0, 1, 0)], 13: [(4, 0, 6, 3), (0, 13, 0, 0)]},
}
PLAIN: dict[str, float] = {}
EVERYTHING = {"temperature": 0.7, "scale": 1.3, "softcap": 3.0}


def check_world() -> None:
    """Everything that needs this many ranks, in one job: start-up costs more than the checks."""
    with process_group(timeout_s=60) as world:
        for name in SHARDS:
            shard = shard_of(name, world)
            for num_tokens, chunk in ((0, 4), (1, 4), (13, 1), (13, 4), (13, 100)):
                check_values(shard, world, num_tokens, chunk)
            check_huge_logits(shard, world)
            check_ranks_agree(shard, world)
        check_half_precision(shard_of("uneven", world), world)
        check_statistics_are_gathered_once(world)
        check_reductions(world)
        check_frozen_parts_are_not_reduced(world)


def shard_of(name: str, world: World) -> VocabShard:
    """This rank's rows in a layout."""
    vocab, rows = SHARDS[name]
    sizes = rows[world.size]
    return VocabShard(sum(sizes[: world.rank]), sizes[world.rank], vocab, dist.group.WORLD, tile=4)


def token_shards(world: World, num_tokens: int) -> list[TokenShard | None]:
    """Without sequence parallelism, and with it in some ways."""
    return [None, *(TokenShard(counts, world.rank) for counts in TOKENS[world.size][num_tokens])]


def borders(vocab: int, world: World) -> tuple[int, ...]:
    """First and last real id of every rank's rows, in all layouts of a vocabulary."""
    edges = {0, vocab - 1}
    for known, rows in SHARDS.values():
        if known == vocab:
            starts = [sum(rows[world.size][:rank]) for rank in range(1, world.size)]
            edges |= {edge for start in starts for edge in (start - 1, start) if edge < vocab}
    return tuple(sorted(edges))


def check_values(shard: VocabShard, world: World, num_tokens: int, chunk: int) -> None:
    for head, tokens in product((PLAIN, EVERYTHING), token_shards(world, num_tokens)):
        problem = make_problem(num_tokens, shard.vocab_size, borders=borders(shard.vocab_size, world), bias=bool(head))
        # with entropy in one head, without in the other
        dense, dense_both = solve(problem, **head), solve(problem, **head, entropy=True)
        for form, invariant in product(FORMS, (False, True) if chunk == 4 else (False,)):
            entropy = bool(head) and form == "recompute"
            cfg = HeadConfig(**head, chunk_tokens=chunk, tp_invariant=invariant)
            done = call(
                problem, form, shard, cfg=cfg, lse_N=dense.lse_N, tokens=tokens, entropy=entropy, accuracy=bool(head)
            )
            expected = own_part(dense_both if entropy else dense, shard, tokens, form=form, target_N=problem.target_N)
            note = f"{form} {shard} {tokens} {cfg}"
            assert_same(done.answer(), expected, tolerance=1e-11, note=note)


def huge_answer(problem: Problem, form: str, shard: VocabShard, tokens: TokenShard | None) -> Answer:
    """A form's answer in float32, given the lse of a pass over the same chunks.

    So the passes' common rounding cancels; other chunks may round otherwise: a product's bits may hang on its rows.
    """
    options = {"cfg": HeadConfig(chunk_tokens=5), "dtype": torch.float32, "tokens": tokens}
    lse_N = call(problem, "recompute", shard, **options).logp.lse_N
    return call(problem, form, shard, lse_N=lse_N, entropy=form == "recompute", **options).answer()


def check_huge_logits(shard: VocabShard, world: World) -> None:
    """fp32 logits of some hundreds, where exp overflows: as good as one rank, whose test bounds that."""
    problem = make_problem(13, shard.vocab_size, scale=30, borders=borders(shard.vocab_size, world))
    dense = solve(problem, entropy=True)
    assert dense.lse_N.max() > 100, "exp would not overflow"
    alone = VocabShard(0, shard.vocab_size, shard.vocab_size, tile=4)
    for form, tokens in product(FORMS, token_shards(world, 13)):
        entropy = form == "recompute"
        answer = huge_answer(problem, form, shard, tokens)
        single = huge_answer(problem, form, alone, None)
        expected = own_part(dense if entropy else solve(problem), shard, tokens, form=form, target_N=problem.target_N)
        single = own_part(single, shard, tokens, form=form, target_N=problem.target_N)
        for name in ("lse_N", "logp_N", "grad_NH", "grad_VH", *(["entropy_N"] if entropy else [])):
            wanted = getattr(expected, name)
            allowed = 1.5 * error(getattr(single, name), wanted) + 1e-6 * float(wanted.norm())
            assert error(getattr(answer, name), wanted) <= allowed, f"{form} {shard} {tokens} {name}"


def check_half_precision(shard: VocabShard, world: World) -> None:
    """Gradients lose no more than a dense fp32 computation whose result is rounded; values are fp32."""
    problem = make_problem(13, shard.vocab_size, borders=borders(shard.vocab_size, world), bias=True)
    problem = problem.rounded(torch.bfloat16)
    for form, tokens in product(FORMS, token_shards(world, 13)):
        entropy = form == "recompute"
        exact, single = solve(problem, entropy=entropy), solve(problem, entropy=entropy, dtype=torch.float32)
        exact, single = (own_part(one, shard, tokens, form=form, target_N=problem.target_N) for one in (exact, single))
        options = {"dtype": torch.bfloat16, "lse_N": exact.lse_N.float(), "tokens": tokens, "entropy": entropy}
        answer = call(problem, form, shard, cfg=HeadConfig(chunk_tokens=5), **options).answer()
        narrow = call(problem, form, shard, cfg=HeadConfig(chunk_tokens=5, low_precision_grad=True), **options).answer()
        torch.testing.assert_close(answer.logp_N, exact.logp_N.float(), rtol=4e-6, atol=4e-6)
        for name in ("grad_NH", "grad_VH", "grad_V"):
            mine, wanted = getattr(answer, name), getattr(exact, name)
            assert mine.dtype == torch.bfloat16
            allowed = 1.01 * error(getattr(single, name).bfloat16(), wanted)
            assert error(mine, wanted) <= allowed, f"{form} {shard} {tokens} {name}"
            # blocks of 5 x 4 rounded to 2 ** -9 each; one process's test has the exact bound
            assert error(getattr(narrow, name), wanted) <= 2**-6 * float(wanted.norm()), name


def check_ranks_agree(shard: VocabShard, world: World) -> None:
    problem = make_problem(13, shard.vocab_size)
    for tokens in token_shards(world, 13):
        done = call(problem, "recompute", shard, dtype=torch.float32, tokens=tokens, entropy=True, accuracy=True)
        weighted = call(problem, "weighted", shard, dtype=torch.float32, tokens=tokens, accuracy=True)
        values = [done.value.detach(), done.logp.entropy_N.detach(), done.logp.lse_N, done.logp.correct_N.float()]
        values += [weighted.value.detach(), weighted.logp.logp_N, weighted.logp.correct_N.float()]
        assert all(same_on_all_ranks(value, dist.group.WORLD) for value in values)


def pieces(tokens: TokenShard | None, num_tokens: int, chunk: int) -> list[int]:
    """Tokens of each rank in each chunk, where there are any: what sequence parallelism moves at a time."""
    found, ends = [], [sum(tokens.counts[: rank + 1]) for rank in range(len(tokens.counts))] if tokens else [num_tokens]
    owner = [next(rank for rank, end in enumerate(ends) if token < end) for token in range(num_tokens)]
    for start in range(0, num_tokens, chunk):
        found += Counter(owner[start : start + chunk]).values()
    return found


def check_statistics_are_gathered_once(world: World) -> None:
    """[2, N] numbers, more rows for entropy and accuracy only, in one collective forward and none backward."""
    shard, group = shard_of("no equal parts", world), dist.group.WORLD
    problem = make_problem(13, shard.vocab_size)
    lse_N, alone = solve(problem).lse_N, world.size == 1
    weight_VH = padded(problem.weight_VH, start=shard.start, size=shard.size)
    for chunk in (1, 4, 13):
        cfg = HeadConfig(chunk_tokens=chunk)
        whole, rest = divmod(13, chunk)
        for entropy, accuracy in product((False, True), (False, True)):
            rows = 2 + entropy + accuracy
            once = Counter({} if alone else {("gather", rows * 13): 1})
            with counted(group) as scoring, torch.no_grad():
                options = {"cfg": cfg, "entropy": entropy, "accuracy": accuracy}
                linear_logp(problem.hidden_NH, weight_VH, problem.target_N, shard, **options)
            with counted(group) as recompute:
                call(problem, "recompute", shard, **options)
            assert scoring == recompute == once
            with counted(group) as given:
                call(problem, "given lse", shard, cfg=cfg, lse_N=lse_N, accuracy=accuracy)
            assert not given
            with counted(group) as weighted:
                call(problem, "weighted", shard, cfg=cfg, accuracy=accuracy)
            each = Counter({("gather", (2 + accuracy) * chunk): whole})
            each += Counter({("gather", (2 + accuracy) * rest): 1 if rest else 0})
            assert weighted == (Counter() if alone else each)


def check_reductions(world: World) -> None:
    """dH: one all-reduce, or pieces to their owners, or a gather a chunk where it must not depend on the ranks."""
    shard, group = shard_of("uneven", world), dist.group.WORLD
    problem = make_problem(13, shard.vocab_size)
    lse_N, alone = solve(problem).lse_N, world.size == 1
    for tokens, chunk, invariant in product(token_shards(world, 13), (4, 13), (False, True)):
        moved = pieces(tokens, 13, chunk)
        fetched = Counter(("broadcast", rows * HIDDEN) for rows in moved if tokens is not None and not alone)
        chunks = [min(chunk, 13 - start) for start in range(0, 13, chunk)]
        if alone:
            reduced = Counter()
        elif invariant:
            reduced = Counter(("gather", rows * HIDDEN) for rows in chunks)
        elif tokens is None:
            reduced = Counter({("all-reduce", 13 * HIDDEN): 1})
        else:
            reduced = Counter(("reduce", rows * HIDDEN) for rows in moved)
        statistics = {
            "recompute": Counter({("gather", 2 * 13): 1}),
            "weighted": Counter(("gather", 2 * rows) for rows in chunks),
            "given lse": Counter(),
        }
        for form in FORMS:
            cfg = HeadConfig(chunk_tokens=chunk, tp_invariant=invariant)
            with counted(group) as forward:
                done = call(problem, form, shard, cfg=cfg, lse_N=lse_N, tokens=tokens)
            with counted(group) as backward:
                done.answer()
            gathered = Counter() if alone else statistics[form]
            note = f"{form} {tokens} chunk {chunk} invariant {invariant}: {forward} {backward}"
            # the weighted forms' gradient is formed forward, and under way from there unless it is one all-reduce
            late = form == "recompute" or (tokens is None and not invariant)
            assert forward == fetched + gathered + (Counter() if late else reduced), note
            assert backward == (fetched if form == "recompute" else Counter()) + (reduced if late else Counter()), note


def check_frozen_parts_are_not_reduced(world: World) -> None:
    """Where only the head trains, no dH moves; where only the hidden states do, no dW is made."""
    shard, group = shard_of("uneven", world), dist.group.WORLD
    problem = make_problem(13, shard.vocab_size)
    dense = solve(problem)
    for tokens in token_shards(world, 13):
        expected = own_part(dense, shard, tokens, form="recompute", target_N=problem.target_N)
        for trains_head in (True, False):
            hidden_LH = own_rows(problem.hidden_NH, tokens).clone().requires_grad_(not trains_head)
            weight_VH = padded(problem.weight_VH, start=shard.start, size=shard.size).requires_grad_(trains_head)
            done = linear_logp(hidden_LH, weight_VH, problem.target_N, shard, tokens=tokens)
            with counted(group) as backward:
                (done.logp_N * problem.upstream_N).sum().backward()
            reductions = sum(times for (name, _), times in backward.items() if "reduce" in name)
            trained, frozen = (weight_VH, hidden_LH) if trains_head else (hidden_LH, weight_VH)
            wanted = expected.grad_VH if trains_head else expected.grad_NH
            torch.testing.assert_close(trained.grad, wanted, rtol=1e-11, atol=1e-11)
            assert frozen.grad is None
            assert (reductions > 0) == (world.size > 1 and not trains_head)


def test_one_rank_takes_the_same_path_without_collectives():
    check_world()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_shards_give_the_dense_answer_with_few_collectives(num_ranks):
    run_ranks(check_world, num_ranks)
