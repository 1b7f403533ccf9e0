"""Which ids a rank owns."""

import torch

from megalign.ops.vocab import VocabShard


def test_every_id_has_one_owner_and_padding_rows_none():
    # 10 ids over 4 ranks of 4 rows: 4 + 4 + 2 + 0, the last 6 rows are padding
    shards = [VocabShard(4 * rank, 4, 10) for rank in range(4)]
    assert [shard.num_real for shard in shards] == [4, 4, 2, 0]
    ids = torch.arange(10)
    owned = torch.stack([shard.localize(ids)[0] for shard in shards])
    assert owned.sum(dim=0).tolist() == [1] * 10
    assert shards[1].localize(ids)[1].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 0, 0]
