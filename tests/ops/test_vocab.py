"""Which ids a rank owns, and in which tiles."""

import pytest
import torch

from megalign.ops.vocab import MOST_TENSOR_RANKS, VocabShard, tile_rows


def test_every_id_has_one_owner_and_padding_rows_none():
    # 10 ids over 4 ranks of 4 rows: 4 + 4 + 2 + 0, the last 6 rows are padding
    shards = [VocabShard(4 * rank, 4, 10) for rank in range(4)]
    assert [shard.num_real for shard in shards] == [4, 4, 2, 0]
    ids = torch.arange(10)
    owned = torch.stack([shard.localize(ids)[0] for shard in shards])
    assert owned.sum(dim=0).tolist() == [1] * 10
    assert shards[1].localize(ids)[1].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 0, 0]


def test_tiles_end_with_the_real_rows():
    # 10 ids in tiles of 4 over 2 ranks of 8 rows: 4 + 4, then 2; a third rank would have padding only
    tiles = [VocabShard(8 * rank, 8, 10, tile=4).tiles for rank in range(3)]
    assert tiles == [[slice(0, 4), slice(4, 8)], [slice(0, 2)], []]


@pytest.mark.parametrize("padded", [16, 1024, 5120, 32000, 128256, 152064, 256000, 262144])
@pytest.mark.parametrize(("device", "most"), [("cpu", 4096), ("cuda", 262144 // 16)])
def test_every_tensor_parallel_size_cuts_between_tiles(padded, device, most):
    rows = tile_rows(padded, device)
    assert rows <= most and padded % rows == 0
    num_tiles = padded // rows
    assert num_tiles & (num_tiles - 1) == 0, "not a binary tree"
    for ranks in (1, 2, 4, 8, MOST_TENSOR_RANKS):
        assert (padded // ranks) % rows == 0
        cut = [
            slice(rank * padded // ranks + tile.start, rank * padded // ranks + tile.stop)
            for rank in range(ranks)
            for tile in VocabShard(rank * padded // ranks, padded // ranks, padded - 3, tile=rows).tiles
        ]
        assert cut == VocabShard(0, padded, padded - 3, tile=rows).tiles
