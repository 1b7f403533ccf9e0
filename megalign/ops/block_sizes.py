"""Sizes of the blocks in which each kind of device computes a vocabulary head; numbers depend on them.

Measured on a CPU with benchmarks/logp.py. Those of a GPU are estimates for an H100 in bf16, for 8,192 tokens, hidden
size 4,096 and 128,256 ids: with 8 to 16 tiles of V/16 rows each product is large enough to run near the peak, and each
dW tile, which is read and written once a chunk, is passed over once instead of four times (chunks of 2,048 tokens).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """Holds the sizes of one kind of device."""

    block_bytes: int  # fp32 logits of one block: a chunk of tokens x a tile of the vocabulary
    kept_bytes: int  # fp32 logits of a chunk over the whole vocabulary, where they are kept (`OwnLse`)
    most_chunk_tokens: int
    most_tile_rows: int | None  # tiles of V/16 rows are halved until they have no more; None: never


BLOCK_SIZES = {
    # Larger blocks, chunks and tiles are not faster; smaller tiles allow more tokens in the same memory.
    "cpu": BlockSizes(block_bytes=32 << 20, kept_bytes=64 << 20, most_chunk_tokens=2048, most_tile_rows=4096),
    # 300 MB is what 8,192 tokens take over a sixteenth of 152,064 ids. A GB keeps 2,000 tokens over 128,256 ids and
    # 1,000 over 262,144: fewer would read and write dW more often than the fourth product costs.
    "cuda": BlockSizes(block_bytes=300 << 20, kept_bytes=1 << 30, most_chunk_tokens=8192, most_tile_rows=None),
}

# If fewer tokens fit into a chunk with kept logits, four products over larger chunks replace three over these. Three
# were faster at 524 tokens and slower at 110 (benchmarks/logp.py, one CPU thread); between them it was not measured.
FEWEST_KEPT = 512
