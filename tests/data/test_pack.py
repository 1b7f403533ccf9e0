"""Check `pack` against a slow version that handles one sequence at a time."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from megalign.data.group import Response, TokenSequence
from megalign.data.micro_batch import context_part, contiguous_part, pack

tokens = st.lists(st.integers(0, 99), min_size=1, max_size=9)


@st.composite
def sequence(draw):
    ids = draw(tokens)
    mask = draw(st.none() | st.tuples(*[st.booleans()] * len(ids)))
    return TokenSequence(0, 0, "response", tuple(draw(tokens)), Response(tuple(ids), scored=mask))


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.lists(sequence(), max_size=6), st.booleans(), st.sampled_from([1, 2, 8]), st.randoms(use_true_random=False))
def test_pack_equals_one_sequence_at_a_time(sequences, pad_rows, multiple_of, random):
    members = list(range(len(sequences)))
    random.shuffle(members)
    batch = pack(sequences, members, pad_rows=pad_rows, multiple_of=multiple_of)

    assert batch.num_positions % multiple_of == 0 and batch.num_positions == batch.cu_seqlens[-1]
    assert batch.members == tuple(members)
    assert int(batch.real_T.sum()) == sum(len(one) for one in sequences)
    ends = batch.cu_seqlens.tolist()
    assert batch.cu_seqlens.dtype == torch.int32 and ends[0] == 0
    found = sorted(zip(batch.seq_N.tolist(), batch.scored_N.tolist(), batch.target_N.tolist()))
    expected = []
    for place, member in enumerate(members):
        one = sequences[member]
        ids = list(one.prompt_ids + one.response.ids)
        begin, end = ends[place], ends[place + 1]
        assert batch.token_T[begin : begin + len(ids)].tolist() == ids
        assert not batch.token_T[begin + len(ids) : end].any()
        assert batch.position_T[begin:end].tolist() == list(range(end - begin))
        assert end - begin == (max(map(len, sequences)) if pad_rows else len(ids))
        for offset, token in enumerate(one.response.ids):
            if one.response.scored is None or one.response.scored[offset]:
                expected.append((place, begin + len(one.prompt_ids) + offset - 1, token))
    assert found == sorted(expected)
    assert batch.scored_N.tolist() == sorted(batch.scored_N.tolist())
    used = ends[len(members)]
    assert len(ends) == len(members) + 1 + (used < batch.num_positions)
    assert batch.position_T[used:].tolist() == list(range(batch.num_positions - used))
    for tensor in (batch.token_T, batch.position_T, batch.scored_N, batch.target_N, batch.seq_N):
        assert tensor.dtype == torch.int64


def test_a_dummy_computes_little_and_scores_nothing():
    batch = pack([], [], multiple_of=4)
    assert batch.token_T.tolist() == [0, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 4]
    assert not batch.real_T.any() and batch.scored_N.numel() == batch.target_N.numel() == batch.seq_N.numel() == 0


def test_hand_case():
    # Prompt 10 11, response 12 13: positions 1 and 2 predict 12 and 13. Second slot starts at 4; its mask drops 22.
    first = TokenSequence(0, 0, "response", (10, 11), Response((12, 13)))
    second = TokenSequence(1, 1, "response", (20,), Response((21, 22, 23), scored=(True, False, True)))
    batch = pack([first, second], [0, 1])
    assert batch.token_T.tolist() == [10, 11, 12, 13, 20, 21, 22, 23]
    assert batch.position_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.scored_N.tolist() == [1, 2, 4, 6]
    assert batch.target_N.tolist() == [12, 13, 21, 23]
    assert batch.seq_N.tolist() == [0, 0, 1, 1]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(sequence(), max_size=5), st.booleans(), st.sampled_from([2, 3, 4]), st.sampled_from([1, 2, 3]))
def test_context_ranks_share_a_row_without_gap_or_overlap(sequences, pad_rows, size, rows):
    batch = pack(
        sequences, range(len(sequences)), pad_rows=pad_rows, multiple_of=2 * size * rows, slot_multiple_of=2 * size
    )
    assert batch.num_positions % (2 * size * rows) == 0
    slots = batch.cu_seqlens.diff()
    assert not (slots % (2 * size)).any()
    parts = [context_part(batch, rank, size) for rank in range(size)]
    row = torch.arange(batch.num_positions)
    first_T = row - batch.position_T  # of the position's slot
    seen, scored = [], []
    for rank, part in enumerate(parts):
        held = []
        for first, slot in zip(batch.cu_seqlens[:-1].tolist(), slots.tolist()):
            run = slot // (2 * size)
            for place in (rank, 2 * size - 1 - rank):
                held += range(first + place * run, first + (place + 1) * run)
        held = torch.tensor(held)
        assert torch.equal(part.token_L, batch.token_T[held])
        assert torch.equal(part.position_L, batch.position_T[held]) and torch.equal(part.real_L, batch.real_T[held])
        assert torch.equal(held[part.scored_M], batch.scored_N[part.index_M])
        assert torch.equal(part.target_M, batch.target_N[part.index_M])
        assert torch.equal(part.scored_M, part.scored_M.sort().values)
        # Causal attention costs every rank the same: pairs of positions of which the first sees the second.
        seen.append(int((part.position_L + 1).sum()))
        scored += part.index_M.tolist()
    assert len(set(seen)) == 1 and sum(seen) == int((row - first_T + 1).sum())
    assert sorted(scored) == list(range(len(batch.scored_N)))


def test_a_rank_holds_a_run_and_its_mirror_image():
    # 7 tokens in a slot of 8 for two ranks: runs (0 1) (2 3) (4 5) (6 7); rank 0 has the outer ones
    one = TokenSequence(0, 0, "response", (10, 11), Response((12, 13, 14, 15, 16)))
    batch = pack([one], [0], multiple_of=4, slot_multiple_of=4)
    outer, inner = (context_part(batch, rank, 2) for rank in (0, 1))
    assert outer.token_L.tolist() == [10, 11, 16, 0] and inner.token_L.tolist() == [12, 13, 14, 15]
    assert outer.position_L.tolist() == [0, 1, 6, 7]
    assert outer.real_L.tolist() == [True, True, True, False]
    # position 1 predicts 12, which the other rank holds; the last token predicts nothing that is scored
    assert (outer.scored_M.tolist(), outer.target_M.tolist(), outer.index_M.tolist()) == ([1], [12], [0])
    assert (inner.scored_M.tolist(), inner.target_M.tolist()) == ([0, 1, 2, 3], [13, 14, 15, 16])


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(sequence(), max_size=5), st.booleans(), st.sampled_from([1, 2, 3, 4]))
def test_contiguous_parts_are_the_row_cut_in_equal_pieces(sequences, pad_rows, size):
    batch = pack(sequences, range(len(sequences)), pad_rows=pad_rows, multiple_of=size)
    parts = [contiguous_part(batch, rank, size) for rank in range(size)]
    assert {len(part.token_L) for part in parts} == {batch.num_positions // size}
    for mine, whole in (
        ("token_L", batch.token_T),
        ("position_L", batch.position_T),
        ("length_L", batch.length_T),
        ("real_L", batch.real_T),
        ("target_M", batch.target_N),
        ("index_M", torch.arange(len(batch.scored_N))),
    ):
        assert torch.equal(torch.cat([getattr(part, mine) for part in parts]), whole), mine
    first = [rank * batch.num_positions // size + part.scored_M for rank, part in enumerate(parts)]
    assert torch.equal(torch.cat(first), batch.scored_N)
