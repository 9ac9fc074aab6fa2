"""Tunables of decode attention and the rule that picks them from the shape and the SM count."""

from __future__ import annotations

import dataclasses

from pallas_kernels import checks, mosaic

TILE = 64
"""Tokens a tile: wgmma's M in Q K^T and its K in P V."""
MAX_GROUP = 16
MAX_BATCH = 1024
"""Rows; a block lists in shared memory those that it must recompute."""
SM_SMEM_BYTES = 228 * 1024
"""Shared memory of a Hopper SM, of which every resident block takes 1 KB for itself."""
MAX_BUFFERS = 12
MIN_TILES = 4
MANY_PARTS = 16
"""Parts of a row that one block adds up with ease; for more, fewer and larger blocks do better."""
ALONE_BYTES, BESIDE_BYTES = 128 * 1024, 80 * 1024
"""Keys and values that a block keeps in flight, alone on an SM and beside another: several times
what its share of the device's bandwidth needs. More measured slower."""
LEAST_BLOCKS = 0.9
"""Share of the resident blocks with which a memory-bound kernel is as fast as with all."""


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How one launch is cut up.

    Attributes:
      blocks_per_sm: blocks that an SM holds at the same time; sets the shared memory of each.
      buffers: K or V tiles (64 tokens) that a block keeps in flight; at least 2.
      min_tiles: tiles that a block gets at least; more means fewer partial results to add up.
      blocks: blocks per kv head; None lets the SM count decide.
      merge: partial results that the last block of a row loads at a time.
    """

    blocks_per_sm: int = 2
    buffers: int = 6
    min_tiles: int = MIN_TILES
    blocks: int | None = None
    merge: int = 4

    def __post_init__(self) -> None:
        """Raises `ValueError` for numbers that no launch could have."""
        blocks = 1 if self.blocks is None else self.blocks
        per_sm, least, merge = self.blocks_per_sm, self.min_tiles, self.merge
        checks.whole(1, blocks_per_sm=per_sm, min_tiles=least, merge=merge, blocks=blocks)
        checks.whole(2, buffers=self.buffers)


def padded_group(group: int) -> int:
    """Query heads of one kv head, as wgmma's N takes them (multiples of 8)."""
    return -(-group // 8) * 8


def padded_head_size(head_size: int) -> int:
    """Head size in shared memory: a multiple of 64 (TMA fills the columns past the end with 0)."""
    return -(-head_size // 64) * 64


def other_smem_bytes(head_size: int, group: int) -> int:
    """Shared memory of a block beside the K and V buffers: queries, P, output, small things."""
    rows, columns = padded_group(group), padded_head_size(head_size)
    return 4 * rows * columns * 2 + rows * TILE * 2 + 6 * 1024


def largest(head_size: int, group: int, blocks_per_sm: int) -> DecodeConfig:
    """As much as fits with so many blocks on an SM.

    A block that is alone leaves a part of the SM's shared memory to the next kernel, which brings
    its first weights meanwhile, unless its buffers would then be few.
    """
    buffer_bytes = TILE * padded_head_size(head_size) * 2
    room = SM_SMEM_BYTES // blocks_per_sm - 1024 - other_smem_bytes(head_size, group)
    # A partial result takes this many registers a thread, of 128 (255 for a block that is alone).
    registers = padded_head_size(head_size) * padded_group(group) // 128
    alone = blocks_per_sm == 1
    wanted = max(ALONE_BYTES // buffer_bytes, 6) if alone else BESIDE_BYTES // buffer_bytes
    buffers = min(room // buffer_bytes, wanted, MAX_BUFFERS)
    merge = min(MANY_PARTS, 128 // registers) if alone else min(8, 32 // registers)
    return DecodeConfig(blocks_per_sm=blocks_per_sm, buffers=max(buffers, 2), merge=max(1, merge))


def choose(head_size: int, group: int, batch: int = 1, kv_heads: int = 1) -> DecodeConfig:
    """The default configuration.

    Two blocks an SM, so that one computes while the other meets others or waits for its first tile;
    one, where two cut each row into so many parts that adding them up takes longer than that saves.
    """
    two = largest(head_size, group, 2)
    if two.buffers < 3 or blocks_per_head(two, kv_heads) > MANY_PARTS * batch:
        return largest(head_size, group, 1)
    return two


def blocks_per_head(config: DecodeConfig, kv_heads: int, batch: int = 1) -> int:
    """Blocks that share the tiles of one kv head; all blocks of a launch should be resident.

    Where up to a tenth fewer blocks divide the rows, or the rows them, it is so many: rows of one
    length are then cut nowhere, or all alike, and no block meets two others.
    """
    if config.blocks is not None:
        return config.blocks
    most = max(1, config.blocks_per_sm * mosaic.sm_count() // kv_heads)
    for blocks in range(most, int(LEAST_BLOCKS * most), -1):
        if blocks % batch == 0 or batch % blocks == 0:
            return blocks
    return most
