"""The order in which tiles' statistics and sums are merged.

Axes: N tokens.
"""

import pytest
import torch

from megalign.ops.statistics import Statistics, TreeSum, Wanted, merge, of_nothing, tree


def pair(a: str, b: str) -> str:
    return f"({a}{b})"


def test_neighbours_merge_level_by_level():
    assert tree(list("abcdefgh"), pair) == "(((ab)(cd))((ef)(gh)))"
    assert tree(list("abcdefg"), pair) == "(((ab)(cd))((ef)g))"
    assert tree(["a"], pair) == "a"


@pytest.mark.parametrize("num_real", range(1, 17))
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_ranks_continue_the_tree_of_their_tiles(num_real, ranks):
    # "-" is what a rank of padding only brings: merging it changes nothing
    tiles = [chr(ord("a") + place) for place in range(num_real)]
    each = 16 // ranks
    mine = [tiles[rank * each : (rank + 1) * each] for rank in range(ranks)]

    def over_ranks(a: str, b: str) -> str:
        return a if b == "-" else pair(a, b)

    assert tree([tree(one, pair) if one else "-" for one in mine], over_ranks) == tree(tiles, pair)


@pytest.mark.parametrize("count", range(1, 18))
def test_a_running_sum_has_the_order_of_the_tree(count):
    # numbers of very different size: another order gives other bits
    random = torch.Generator().manual_seed(count)
    parts = [torch.randn(64, generator=random) * 10 ** (place % 5) for place in range(count)]
    running = TreeSum()
    for one in parts:
        running.add(one.clone())
    assert torch.equal(running.total(), tree(parts, torch.add))


def test_a_sum_of_nothing():
    assert TreeSum().total() is None


def test_nothing_changes_no_bit():
    random = torch.Generator().manual_seed(0)
    wanted = Wanted(entropy=True, largest=True)
    some = Statistics(*(torch.randn(37, generator=random).abs() * 50 for _ in range(4)))
    nothing = of_nothing(some.lse_N, wanted)
    for merged in (merge(some, nothing), merge(nothing, some)):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(merged.rows(), some.rows(), strict=True))
    assert not any(row.isnan().any() for row in merge(nothing, nothing).rows())
