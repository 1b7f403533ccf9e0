"""pack against a slow version that knows one sequence at a time."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from megalign.data.batch import pack
from megalign.data.group import Response, Sequence

tokens = st.lists(st.integers(0, 99), min_size=1, max_size=9)


@st.composite
def sequence(draw):
    ids = draw(tokens)
    mask = draw(st.none() | st.tuples(*[st.booleans()] * len(ids)))
    return Sequence(0, 0, "response", tuple(draw(tokens)), Response(tuple(ids), scored=mask))


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
    first = Sequence(0, 0, "response", (10, 11), Response((12, 13)))
    second = Sequence(1, 1, "response", (20,), Response((21, 22, 23), scored=(True, False, True)))
    batch = pack([first, second], [0, 1])
    assert batch.token_T.tolist() == [10, 11, 12, 13, 20, 21, 22, 23]
    assert batch.position_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.scored_N.tolist() == [1, 2, 4, 6]
    assert batch.target_N.tolist() == [12, 13, 21, 23]
    assert batch.seq_N.tolist() == [0, 0, 1, 1]
