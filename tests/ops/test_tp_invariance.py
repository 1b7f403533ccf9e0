"""The same bits at every tensor-parallel size, on gloo: log-probs, log-sum-exps, entropies, dW, and dH where asked for.

Axes: N tokens, V this rank's rows of the padded vocabulary, H hidden. Four ranks compute every case three times: each
alone with the whole vocabulary, in two pairs, and together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
import torch.distributed as dist

from megalign.ops.head_blocks import HeadBlocks, HeadConfig
from megalign.ops.hidden_rows import TokenShard
from megalign.ops.vocab import VocabShard, tile_rows
from megalign.runtime.distributed import process_group
from tests.support.head_calls import FORMS, call, error, own_part
from tests.support.processes import run_ranks
from tests.support.slow_logp import Answer, Problem, make_problem

# (vocabulary, padded): the last tile cut short; more rows; an odd number of tiles and ranks of padding only
VOCABULARIES = [(1000, 1024), (5000, 5120), (700, 1024)]
NUM_TOKENS, NUM_HIDDEN = 29, 64
# (tokens a chunk, of which the last is short, inputs)
FEW = ((12, torch.float32),)
MANY = ((6, torch.float32), (None, torch.float32), (6, torch.bfloat16))
TOKENS = {2: [(12, 17), (0, 29)], 4: [(8, 0, 14, 7)]}
HEADS = ({}, {"temperature": 0.7, "scale": 1.3, "softcap": 8.0})


@dataclass(frozen=True, slots=True)
class Team:
    """Ranks that share a vocabulary; `group=None` is this rank alone."""

    size: int
    rank: int
    group: dist.ProcessGroup | None

    def shard(self, vocab: int, padded: int) -> VocabShard:
        rows = padded // self.size
        return VocabShard(self.rank * rows, rows, vocab, self.group, tile=tile_rows(padded))


def check_four_ranks() -> None:
    """Every case in one job: start-up costs more than the checks."""
    with process_group(timeout_s=60) as world:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        alone = Team(1, 0, None)
        teams = [Team(2, world.rank % 2, pairs[world.rank // 2]), Team(4, world.rank, dist.group.WORLD)]
        for vocab, padded in VOCABULARIES:
            for head in HEADS:
                problem = make_problem(NUM_TOKENS, vocab, bias=bool(head), hidden=NUM_HIDDEN, borders=(0, vocab - 1))
                problem.hidden_NH /= 4
                for chunk, dtype in FEW if vocab == 5000 else MANY:
                    check_case(problem, padded, alone, teams, HeadConfig(**head, chunk_tokens=chunk), dtype)


def check_case(
    problem: Problem, padded: int, alone: Team, teams: list[Team], cfg: HeadConfig, dtype: torch.dtype
) -> None:
    vocab = len(problem.weight_VH)
    lse_N = call(problem, "recompute", alone.shard(vocab, padded), cfg=cfg, dtype=dtype).logp.lse_N
    for form, invariant in product(FORMS, (False, True)):
        options = {
            "cfg": replace(cfg, tp_invariant=invariant),
            "dtype": dtype,
            "lse_N": lse_N,
            "entropy": form == "recompute",
        }
        reference = call(problem, form, alone.shard(vocab, padded), **options).answer()
        assert torch.equal(reference.lse_N, lse_N)
        for team in teams:
            shard = team.shard(vocab, padded)
            for counts in (None, *TOKENS[team.size]):
                tokens = None if counts is None else TokenShard(counts, team.rank)
                answer = call(problem, form, shard, tokens=tokens, **options).answer()
                expected = own_part(reference, shard, tokens, form=form, target_N=problem.target_N)
                note = f"{form} {team.size} ranks, vocabulary {vocab}, tokens {counts}, {options['cfg']}, {dtype}"
                assert_same_bits(answer, expected, invariant=invariant, note=note)


def assert_same_bits(answer: Answer, expected: Answer, *, invariant: bool, note: str) -> None:
    """dH may differ by the order of its sum where it is reduced over ranks; nothing else may."""
    for name, mine in vars(answer).items():
        theirs = getattr(expected, name)
        if mine is None:
            continue
        if name == "grad_NH" and not invariant:
            share = 1e-6 if mine.dtype == torch.float32 else 2**-8
            assert error(mine, theirs) <= share * float(theirs.double().norm()), f"{note}: {name}"
        else:
            assert torch.equal(mine, theirs), f"{note}: {name} is off by {error(mine, theirs):.1e}"


@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_are_the_same_tokens_at_every_tensor_parallel_size(keep_logits, dtype):
    # their number changes the order of dW's sum
    chunks = set()
    for size in (1, 2, 4):
        shard = Team(size, size - 1, None).shard(151000, 152064)
        blocks = HeadBlocks(dtype, torch.empty(shard.size, 1, dtype=dtype), None, shard, HeadConfig())
        chunks.add(blocks.tokens_a_chunk(keep_logits=keep_logits))
    assert len(chunks) == 1


def test_tensor_parallel_size_changes_no_bit():
    run_ranks(check_four_ranks, 4)
