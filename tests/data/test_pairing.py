"""Check the sequences' roles for each loss, and the rules of EPA's weak negatives."""

import pytest

from megalign.data.config import DataConfig
from megalign.data.dataset import from_records
from megalign.data.group import Pairing
from megalign.schema import UserError
from tests.support.toy_tokenizer import VOCAB_SIZE


def build(records, pairing, *, seed=0, max_length=20, **settings):
    cfg = DataConfig(max_length=max_length, tokens_per_micro_batch=20, **settings)
    return from_records(records, cfg, None, pairing=pairing, seed=seed, vocab_size=VOCAB_SIZE)


def rewarded(prompt, *rewards):
    """Responses of prompt p are [10 p + place]."""
    responses = [{"response_ids": [10 * prompt + i], "reward": r} for i, r in enumerate(rewards)]
    return {"prompt_ids": [prompt], "responses": responses}


def roles(data, index=0, epoch=0):
    flat, num_groups = data.sequences([(epoch, index)])
    assert num_groups == 1
    return [(one.role, one.response.ids[0]) for one in flat]


def test_samples_and_group_numbers():
    data = build([rewarded(1, 0, 1, 2), rewarded(2, 5, 5)], Pairing("samples"))
    flat, num_groups = data.sequences([(0, 1), (0, 0), (1, 1)])
    assert num_groups == 3
    assert [one.group for one in flat] == [0, 0, 1, 1, 1, 2, 2]
    assert [one.record for one in flat] == [1, 1, 0, 0, 0, 1, 1]
    assert [one.response.reward for one in flat] == [5, 5, 0, 1, 2, 5, 5]
    assert {one.role for one in flat} == {"response"}
    assert [one.prompt_ids for one in flat[1:3]] == [(2,), (1,)]


def test_single_carries_the_mean_teacher_score():
    records = [
        {"prompt_ids": [1], "response_ids": [2], "teacher_scores": {"a": -1.0, "b": -2.0}},
        {"prompt_ids": [1], "response_ids": [2]},
    ]
    flat, _ = build(records, Pairing("single")).sequences([(0, 0), (0, 1)])
    assert [one.teacher_score for one in flat] == [-1.5, None]


@pytest.mark.parametrize(
    ("rewards", "chosen", "rejected"),
    [((0, 1), 11, 10), ((1, 3, 0, 3, 0), 11, 12), ((2, 2, 1), 10, 12)],
)
def test_preference_takes_the_first_highest_and_first_lowest(rewards, chosen, rejected):
    data = build([rewarded(1, *rewards)], Pairing("preference"))
    assert roles(data) == [("chosen", chosen), ("rejected", rejected)]


def test_pairs_are_taken_as_they_are():
    record = {"prompt_ids": [1], "chosen_ids": [5], "rejected_ids": [6]}
    assert roles(build([record], Pairing("preference"))) == [("chosen", 5), ("rejected", 6)]
    for rule in ("lowest", "random", "all"):
        data = build([record], Pairing("contrast", strong=3, strong_from=rule))
        assert roles(data) == [("positive", 5), ("strong", 6)]


@pytest.mark.parametrize(
    ("strong", "rule", "expected"),
    [
        # Rewards 1 3 0 3 0 2: positive 11; 13 ties with it; worse are 10, 12, 14, 15.
        (1, "lowest", [12]),
        (2, "lowest", [12, 14]),
        (3, "lowest", [12, 14, 10]),
        (9, "lowest", [12, 14, 10, 15]),
        (1, "all", [10, 12, 14, 15]),
        (9, "random", [10, 12, 14, 15]),
    ],
)
def test_strong_negatives(strong, rule, expected):
    data = build([rewarded(1, 1, 3, 0, 3, 0, 2)], Pairing("contrast", strong=strong, strong_from=rule))
    assert roles(data) == [("positive", 11), *[("strong", one) for one in expected]]


def test_random_strong_negatives_change_with_the_epoch_and_reach_all():
    pairing = Pairing("contrast", strong=2, strong_from="random")
    data, again = (build([rewarded(1, 1, 3, 0, 3, 0, 2)], pairing) for _ in range(2))
    seen = [tuple(one for _, one in roles(data, epoch=epoch)[1:]) for epoch in range(30)]
    assert seen == [tuple(one for _, one in roles(again, epoch=epoch)[1:]) for epoch in range(30)]
    assert {one for pair in seen for one in pair} == {10, 12, 14, 15}
    assert all(len(set(pair)) == 2 for pair in seen) and len(set(seen)) > 2


def weak_of(data, index, epoch):
    flat, _ = data.sequences([(epoch, index)])
    return [one for one in flat if one.role == "weak"]


def crowd():
    """Prompts 1 to 6; prompt 1 twice; one response text that 1 and 2 share; one response that is long."""
    records = [rewarded(p, 1, 0, 2) for p in range(1, 7)] + [rewarded(1, 1, 0)]
    records[1]["responses"][0]["response_ids"] = [10]
    records[2]["responses"][0]["response_ids"] = [30] * 19
    records[4]["prompt_ids"] = [5, 5]
    return records


def test_weak_negatives_keep_every_rule():
    data = build(crowd(), Pairing("contrast", strong=1, weak=4))
    reached = set()
    for epoch in range(40):
        for index, group in enumerate(data.groups):
            weak = weak_of(data, index, epoch)
            assert len(weak) == 4
            texts = [one.response.ids for one in weak]
            assert len(set(texts)) == 4
            assert not set(texts) & {response.ids for response in group.responses}
            for one in weak:
                assert one.prompt_ids == group.prompt_ids and one.record == group.record
                assert len(one) <= 20
                assert one.response.reward is None and one.response.behaviour_logp is None
                owners = [g for g in data.groups if one.response.ids in [r.ids for r in g.responses]]
                assert any(owner.prompt_ids != group.prompt_ids for owner in owners)
                reached.add((group.record, one.response.ids))
    # Prompt 1 (twice) may not take its own 10 11 12; everything else that is another's is reached in the end.
    everything = {response.ids for group in data.groups for response in group.responses}
    assert {ids for record, ids in reached if record == 0} == everything - {(10,), (11,), (12,)}
    # The long response does not fit under a prompt of two tokens: 21.
    assert (30,) * 19 not in {ids for record, ids in reached if record == 4}
    assert (30,) * 19 in {ids for record, ids in reached if record == 3}


def test_weak_negatives_depend_on_seed_epoch_and_record_alone():
    pairing = Pairing("contrast", strong=1, weak=2)
    data, again, other = build(crowd(), pairing), build(crowd(), pairing), build(crowd(), pairing, seed=1)
    stream = [(epoch, index) for epoch in range(3) for index in range(7)]
    together, _ = data.sequences(stream)
    apart = [one for item in reversed(stream) for one in again.sequences([item])[0][::-1]][::-1]
    assert [(s.record, s.role, s.response) for s in together] == [(s.record, s.role, s.response) for s in apart]
    assert together != other.sequences(stream)[0]
    by_epoch = [[one.response.ids for one in weak_of(data, 2, epoch)] for epoch in range(5)]
    assert len({tuple(ids) for ids in by_epoch}) > 1


def test_weak_from_positives():
    data = build(crowd(), Pairing("contrast", strong=1, weak=3, weak_from="positives"))
    found = {one.response.ids[0] for epoch in range(20) for one in weak_of(data, 0, epoch)}
    # The best is the third of each; record 6 has prompt 1 and gives nothing.
    assert found == {22, 32, 42, 52, 62}


def test_pins_come_first_and_the_rest_is_drawn():
    records = crowd()
    records[0]["weak"] = [[3, 1], [5, 0], [2, 2]]
    one, two, four = (build(records, Pairing("contrast", strong=1, weak=w)) for w in (1, 2, 4))
    assert [w.response.ids for w in weak_of(one, 0, 0)] == [(41,)]
    assert [w.response.ids for w in weak_of(two, 0, 7)] == [(41,), (60,)]
    drawn = [w.response.ids for w in weak_of(four, 0, 0)]
    assert drawn[:3] == [(41,), (60,), (32,)] and len(set(drawn)) == 4


def test_pins_count_bad_records_too():
    records = [rewarded(1, 1, 0), {"prompt_ids": []}, {**rewarded(2, 1, 0), "weak": [[3, 1]]}, rewarded(3, 1, 0)]
    data = build(records, Pairing("contrast", strong=1, weak=1), on_bad_record="skip")
    assert [w.response.ids for w in weak_of(data, 1, 0)] == [(31,)]
    records[2]["weak"] = [[1, 0]]
    data = build(records, Pairing("contrast", strong=1, weak=1), on_bad_record="skip")
    assert data.report.bad["weak"] == 1
    assert "weak[0] is [1, 0]; must be a record that is not bad itself" in data.report.first_bad["weak"]


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ([[2, 0]], "prompt and response within 20 tokens"),
        ([[3, 0], [3, 0]], r"\[1\] is \[3, 0\]; must be another prompt's response"),
        ([[4, 0]], "another prompt's response"),
    ],
)
def test_pins_that_break_a_rule(pins, message):
    records = crowd()
    records[4]["weak"] = pins
    with pytest.raises(UserError, match=f"record:4: field weak.*{message}"):
        build(records, Pairing("contrast", strong=1, weak=2))


def test_pins_in_chosen_rejected_records():
    pairs = [{"prompt_ids": [p], "chosen_ids": [10 * p], "rejected_ids": [10 * p + 1]} for p in (1, 2, 3)]
    pairs[0]["weak"] = [[2, 1], [1, 0]]
    data = build(pairs, Pairing("contrast", strong=1, weak=2))
    assert roles(data) == [("positive", 10), ("strong", 11), ("weak", 31), ("weak", 20)]


def test_fewer_weak_negatives_where_there_are_no_more():
    data = build([rewarded(1, 1, 0), rewarded(2, 1, 0)], Pairing("contrast", strong=1, weak=5))
    assert sorted(roles(data)[2:]) == [("weak", 20), ("weak", 21)]


def test_weak_negatives_alone_are_enough():
    data = build([rewarded(1, 1), rewarded(2, 1)], Pairing("contrast", strong=1, weak=1))
    assert roles(data) == [("positive", 10), ("weak", 20)]


def test_a_large_pool_is_drawn_from_too():
    records = [
        {"prompt_ids": [1 + p // 80, 1 + p % 80], "response_ids": [1 + p // 80, 9, 1 + p % 80]} for p in range(1500)
    ]
    records = [
        {"prompt_ids": r["prompt_ids"], "responses": [{"response_ids": r["response_ids"], "reward": 1}]}
        for r in records
    ]
    data = build(records, Pairing("contrast", strong=1, weak=3))
    weak = [one for index in range(0, 1500, 50) for one in weak_of(data, index, 0)]
    assert len(weak) == 90
    assert len({one.response.ids for one in weak}) > 80
    own = {index: data.groups[index].responses[0].ids for index in range(1500)}
    assert all(one.response.ids != own[one.record] for one in weak)


def test_rounding_makes_no_better_response():
    """0.1 + 0.2 is 0.3 and the first of the best; with nothing worse there is no pair."""
    data = build([rewarded(1, 0.3, 0.1 + 0.2, 0)], Pairing("contrast", strong=2))
    assert roles(data) == [("positive", 10), ("strong", 12)]
    for pairing in (Pairing("preference"), Pairing("contrast", strong=1)):
        with pytest.raises(UserError, match="record:0: field responses"):
            build([rewarded(1, 0.3, 0.1 + 0.2)], pairing)
