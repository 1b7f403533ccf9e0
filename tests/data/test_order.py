"""Check the order of records over epochs."""

import numpy as np
import pytest

from megalign.data.order import Span, epoch_order, step_items


def items(spans, num_steps, groups_per_step, *, seed=3, shuffle=True):
    steps = [
        step_items(step, spans, groups_per_step=groups_per_step, seed=seed, shuffle=shuffle)
        for step in range(num_steps)
    ]
    assert all(len(step) == groups_per_step for step in steps)
    return [item for step in steps for item in step]


def test_file_order_straddles_epochs():
    steps = [step_items(s, [Span(5)], groups_per_step=3, seed=0, shuffle=False) for s in range(4)]
    assert steps == [
        [(0, 0), (0, 1), (0, 2)],
        [(0, 3), (0, 4), (1, 0)],
        [(1, 1), (1, 2), (1, 3)],
        [(1, 4), (2, 0), (2, 1)],
    ]


def test_a_step_may_hold_several_epochs():
    assert items([Span(2)], 1, 5, shuffle=False) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


def test_every_epoch_is_a_permutation_of_its_own():
    stream = items([Span(20)], 12, 5)
    epochs = [[index for epoch, index in stream if epoch == e] for e in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert items([Span(20)], 4, 5, seed=4) != stream[:20]


@pytest.mark.parametrize("groups_per_step", [1, 2, 4, 6])
def test_the_stream_does_not_depend_on_the_step_size(groups_per_step):
    assert items([Span(7), Span(3, 2.0)], 24 // groups_per_step, groups_per_step) == items(
        [Span(7), Span(3, 2.0)], 1, 24
    )


def test_the_order_is_the_same_in_every_version():
    # What a run resumes into; these numbers must never change.
    epoch_order.cache_clear()
    assert epoch_order(0, (Span(8),), seed=0, shuffle=True).tolist() == [6, 3, 5, 0, 7, 2, 1, 4]
    assert epoch_order(1, (Span(3), Span(5)), seed=7, shuffle=True).tolist() == [3, 4, 1, 0, 6, 7, 2, 5]


def test_weights_count_records_of_an_epoch():
    spans = (Span(10), Span(4, 2.0), Span(6, 0.5), Span(3, 0.1))
    assert [span.per_epoch for span in spans] == [10, 8, 3, 1]
    for epoch in range(4):
        counts = np.bincount(epoch_order(epoch, spans, seed=1, shuffle=True), minlength=23)
        assert counts[:10].tolist() == [1] * 10
        assert counts[10:14].tolist() == [2] * 4
        assert counts[14:20].sum() == 3 and counts[14:20].max() == 1
        assert counts[20:].sum() == 1


def test_half_a_source_is_the_other_half_in_the_next_epoch():
    for shuffle in (True, False):
        halves = [set(epoch_order(e, (Span(6, 0.5),), seed=1, shuffle=shuffle).tolist()) for e in range(4)]
        assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(6))


def test_weight_is_not_hurt_by_binary_fractions():
    assert Span(100, 0.29).per_epoch == 29
    assert Span(0).per_epoch == 0


def test_sources_are_mixed():
    order = epoch_order(0, (Span(50), Span(50)), seed=0, shuffle=True)
    assert 10 < (order[:50] < 50).sum() < 40
