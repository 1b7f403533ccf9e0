"""Check properties of the packing plan on many uneven inputs, and the plan itself on cases worked by hand."""

import itertools

import hypothesis.strategies as st
from hypothesis import given, settings

from megalign.data.packing import plan, units_for

lengths_and_groups = st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=40)
many = settings(max_examples=150, derandomize=True, deadline=None)


def grouped(drawn):
    """Lengths and a group number each; True starts a new group."""
    group_of, number = [], 0
    for place, (_, new) in enumerate(drawn):
        number += bool(new and place)
        group_of.append(number)
    return [length for length, _ in drawn], group_of


def cost(lengths, members, pad_rows):
    if not members:
        return 0
    return len(members) * max(lengths[m] for m in members) if pad_rows else sum(lengths[m] for m in members)


@many
@given(lengths_and_groups, st.integers(1, 6), st.integers(1, 120), st.booleans(), st.booleans(), st.integers(1, 3))
def test_plan_properties(drawn, num_ranks, budget, pad_rows, whole_groups, min_per_rank):
    lengths, group_of = grouped(drawn)
    units = [[i] for i in range(len(lengths))]
    if whole_groups:
        units = [[i for i, g in enumerate(group_of) if g == number] for number in range(group_of[-1] + 1)]
    ranks = plan(lengths, units, num_ranks=num_ranks, budget=budget, pad_rows=pad_rows, min_per_rank=min_per_rank)

    assert len(ranks) == num_ranks
    assert len({len(mine) for mine in ranks}) == 1 and len(ranks[0]) >= min_per_rank
    batches = [batch for mine in ranks for batch in mine if batch]
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for unit in units:
        holders = [batch for batch in batches if set(unit) & set(batch)]
        assert len(holders) == 1 and set(unit) <= set(holders[0])
    for batch in batches:
        alone = any(set(batch) == set(unit) for unit in units)
        assert alone or cost(lengths, batch, pad_rows) <= budget
    for mine in ranks:
        assert all(mine[i] or not mine[i + 1] for i in range(len(mine) - 1)), "dummies come last"
    # A dummy is only there because no micro-batch could be cut further.
    if any(not batch for mine in ranks for batch in mine):
        assert len(batches) == len(units)
    # No more micro-batches than first fit makes on one rank, rounded up to the ranks.
    alone = plan(lengths, units, num_ranks=1, budget=budget, pad_rows=pad_rows)
    assert len(ranks[0]) == max(min_per_rank, -(-len(alone[0]) // num_ranks))
    again = plan(lengths, units, num_ranks=num_ranks, budget=budget, pad_rows=pad_rows, min_per_rank=min_per_rank)
    assert again == ranks


@many
@given(lengths_and_groups, st.integers(1, 120), st.booleans())
def test_units_are_whole_groups_or_nothing(drawn, budget, pad_rows):
    lengths, group_of = grouped(drawn)
    groups = [tuple(i for i, g in enumerate(group_of) if g == number) for number in range(group_of[-1] + 1)]
    fits = all(cost(lengths, members, pad_rows) <= budget for members in groups)
    assert units_for(group_of, lengths, budget=budget, pad_rows=pad_rows) == (groups if fits else None)


def test_first_fit_fills_the_gaps():
    # Longest first: 7, 6, 4, 3 into tens: 7+3, 6+4.
    ranks = plan([3, 7, 4, 6], [[0], [1], [2], [3]], num_ranks=1, budget=10, pad_rows=False)
    assert ranks == [[(0, 1), (2, 3)]]


def test_rows_are_alike_without_packing():
    # Rows x longest <= 12: 6,6 | 3,3,3,3; packing by sum would have mixed them.
    ranks = plan([3, 6, 3, 6, 3, 3], [[i] for i in range(6)], num_ranks=1, budget=12, pad_rows=True)
    assert ranks == [[(0, 2, 4, 5), (1, 3)]]


def test_a_long_sequence_is_a_micro_batch_of_its_own():
    assert plan([50, 2, 2], [[0], [1], [2]], num_ranks=1, budget=10, pad_rows=False) == [[(0,), (1, 2)]]


def test_bins_are_split_so_that_every_rank_works():
    # One bin of 4 + 3 + 2 + 1 becomes 4 + 1 | 3 + 2.
    ranks = plan([1, 2, 3, 4], [[i] for i in range(4)], num_ranks=2, budget=100, pad_rows=False)
    assert ranks == [[(0, 3)], [(1, 2)]]


def test_rows_are_split_where_the_costlier_half_costs_least():
    # Rows of 4, 3, 2, 1 cost 16 together: 4 | 3 3 3 costs 9 at worst, 4 4 | 2 2 costs 8, 4 4 4 | 1 costs 12.
    ranks = plan([1, 2, 3, 4], [[i] for i in range(4)], num_ranks=2, budget=100, pad_rows=True)
    assert ranks == [[(2, 3)], [(0, 1)]]


def test_attention_makes_long_sequences_heavier():
    # At 1/8 a pair, 8 tokens are 16 of work and 4 are 6: 8 + 4 | 4 + 4 is 12 and 8 tokens, 8 | 4 + 4 + 4 is 16 and 18.
    lengths, units = [8, 4, 4, 4], [[i] for i in range(4)]
    by_tokens = plan(lengths, units, num_ranks=2, budget=100, pad_rows=False)
    by_work = plan(lengths, units, num_ranks=2, budget=100, pad_rows=False, attention_cost=1 / 8)
    assert by_tokens == [[(0, 3)], [(1, 2)]] and by_work == [[(1, 2, 3)], [(0,)]]


def test_slots_count_with_their_padding():
    # 5 and 6 take slots of 8: two of them fit 16 positions, three do not, though 5 + 5 + 6 = 16.
    lengths, units = [5, 5, 6], [[i] for i in range(3)]
    assert len(plan(lengths, units, num_ranks=1, budget=16, pad_rows=False)[0]) == 1
    padded = plan(lengths, units, num_ranks=1, budget=16, pad_rows=False, slot_multiple_of=8)
    assert sorted(map(len, padded[0])) == [1, 2]


def slow_best(lengths, count, budget, attention_cost):
    """The least heaviest bin of all ways to put single sequences into `count` bins within the budget."""
    best = float("inf")
    for places in itertools.product(range(count), repeat=len(lengths)):
        bins = [[length for length, place in zip(lengths, places) if place == one] for one in range(count)]
        if all(sum(one) <= budget or len(one) == 1 for one in bins):
            best = min(best, max(sum(n + attention_cost * n * n for n in one) for one in bins))
    return best


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=7), st.integers(2, 3), st.sampled_from([0.0, 0.05]))
def test_work_is_nearly_as_level_as_it_can_be(lengths, num_ranks, attention_cost):
    ranks = plan(
        lengths, [[i] for i in range(len(lengths))], num_ranks=num_ranks, budget=1000, pad_rows=False,
        attention_cost=attention_cost,
    )  # fmt: skip
    work = [sum(lengths[i] + attention_cost * lengths[i] ** 2 for batch in mine for i in batch) for mine in ranks]
    # Longest processing time first is at most 4/3 - 1/(3 ranks) of the best (Graham 1969).
    best = slow_best(lengths, num_ranks, 1000, attention_cost)
    assert max(work) <= best * (4 / 3 - 1 / (3 * num_ranks)) + 1e-9


def test_ranks_get_equal_tokens():
    # Four bins of 9, 8, 2, 1 on two ranks: 9 + 1 and 8 + 2.
    ranks = plan([9, 8, 2, 1], [[i] for i in range(4)], num_ranks=2, budget=9, pad_rows=False)
    assert sorted(sum(sum([9, 8, 2, 1][i] for i in b) for b in mine) for mine in ranks) == [10, 10]


def test_fewer_sequences_than_ranks_leave_dummies():
    ranks = plan([5], [[0]], num_ranks=3, budget=10, pad_rows=False)
    assert ranks == [[(0,)], [()], [()]]
