"""Tunables of decode attention and the rule that picks them from the shape and the SM count."""

from __future__ import annotations

import dataclasses

from pallas_kernels import mosaic

TILE = 64
"""Tokens a tile: wgmma's M in Q K^T and its K in P V."""
HEAD_SIZES = (64, 96, 128, 256)
PAGE_SIZES = (16, 32, 64)
MAX_GROUP = 16
MAX_BATCH = 1024
"""Rows; a block lists in shared memory those that it must recompute."""
SM_SMEM_BYTES = 228 * 1024
"""Shared memory of a Hopper SM, of which every resident block takes 1 KB for itself."""
MAX_BUFFERS = 12


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
    min_tiles: int = 2
    blocks: int | None = None
    merge: int = 4

    def __post_init__(self) -> None:
        for name, least in (("blocks_per_sm", 1), ("buffers", 2), ("min_tiles", 1), ("merge", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks is {self.blocks}, expected at least 1")


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


def choose(head_size: int, group: int) -> DecodeConfig:
    """The default configuration: two blocks an SM, as many buffers as then fit."""
    buffer_bytes = TILE * padded_head_size(head_size) * 2
    buffers = 0
    for blocks_per_sm in (2, 1):
        room = SM_SMEM_BYTES // blocks_per_sm - 1024 - other_smem_bytes(head_size, group)
        buffers = min(room // buffer_bytes, MAX_BUFFERS)
        if buffers >= 3:
            break
    # A partial result takes this many registers a thread; two blocks an SM leave 128 in all.
    registers = padded_head_size(head_size) * padded_group(group) // 128
    return DecodeConfig(
        blocks_per_sm=blocks_per_sm,
        buffers=max(buffers, 2),
        merge=max(1, min(8, (32 if blocks_per_sm == 2 else 64) // registers)),
    )


def blocks_per_head(config: DecodeConfig, kv_heads: int) -> int:
    """Blocks that share the tiles of one kv head; all blocks of a launch should be resident."""
    if config.blocks is not None:
        return config.blocks
    return max(1, config.blocks_per_sm * mosaic.sm_count() // kv_heads)
