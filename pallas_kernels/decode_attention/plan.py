"""Which block works on which tokens: equal, contiguous shares of all tiles of a kv head.

The tiles (64 tokens) that a batch must read are laid end to end, row after row, and block p of P
takes tiles [p T / P, (p + 1) T / P): a ragged batch is balanced to one tile, and at most the first
and last row of a block are shared with others. The plan depends on the lengths only, so that all
layers of a model step share it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention.config import TILE


class Plan(NamedTuple):
    """What the kernel needs beside the lengths; int32.

    Attributes:
      ends: [B], tiles of rows 0..b together.
      starts: [P], the row that block p begins in.
    """

    ends: Any
    starts: Any


class Segment(NamedTuple):
    """The part of a row that one block computes; int32 scalars.

    Attributes:
      row: which row.
      length: its tokens.
      first: tile of the row that holds its first visible token.
      begin, end: the row's tiles that are this block's, counted from the row's token 0.
      continues: 1 if an earlier block has the row's first tiles.
      whole: whether the block has all of them.
      first_block, last_block: the blocks that share the row.
    """

    row: Any
    length: Any
    first: Any
    begin: Any
    end: Any
    continues: Any
    whole: Any
    first_block: Any
    last_block: Any


def first_tile(length: Any, window: int | None) -> Any:
    """The tile that holds a row's first visible token."""
    if window is None:
        return jnp.int32(0)
    return lax.div(jnp.maximum(length - window, 0), jnp.int32(TILE))


def tiles_of(length: Any, window: int | None) -> Any:
    """Tiles that a row takes in the plan; 1 for a padded row, whose zeros somebody must write."""
    last = lax.div(length + (TILE - 1), jnp.int32(TILE))
    return jnp.maximum(last - first_tile(length, window), 1)


def active_blocks(total: Any, blocks: int, min_tiles: int) -> Any:
    """Blocks that get work: no more than there are shares of `min_tiles` tiles."""
    return jnp.minimum(lax.div(total + (min_tiles - 1), jnp.int32(min_tiles)), blocks)


def make_plan(lengths: jax.Array, window: int | None, blocks: int, min_tiles: int) -> Plan:
    """Cuts the tiles of `lengths` into `blocks` shares; two small reductions for XLA."""
    batch = lengths.shape[0]
    tiles = tiles_of(lengths, window)
    row = lax.iota(jnp.int32, batch)
    # Sums of a masked square: one fused reduction, where a cumulative sum is a scan of launches.
    ends = jnp.sum(jnp.where(row[None] <= row[:, None], tiles[None], 0), axis=1, dtype=jnp.int32)
    total = ends[batch - 1]
    block = lax.iota(jnp.int32, blocks)
    lo = lax.div(block * total, active_blocks(total, blocks, min_tiles))
    starts = jnp.sum(ends[None] <= lo[:, None], axis=1, dtype=jnp.int32)
    return Plan(ends, starts)


def walk(
    visit: Callable[[Segment, tuple[Any, ...]], tuple[Any, ...]],
    state: tuple[Any, ...],
    *,
    block: Any,
    blocks: int,
    lengths: Any,
    ends: Any,
    starts: Any,
    window: int | None,
    min_tiles: int,
) -> tuple[Any, ...]:
    """In a kernel: calls `state = visit(segment, state)` for every segment of block `block`."""
    batch = lengths.shape[0]
    total = ends[batch - 1]
    active = active_blocks(total, blocks, min_tiles)
    lo = lax.div(block * total, active)
    hi = jnp.where(block < active, lax.div((block + 1) * total, active), 0)
    row = jnp.minimum(starts[block], batch - 1)  # blocks without work start past the end

    def owner(tile: Any) -> Any:
        return lax.div((tile + 1) * active - 1, total)

    def more(carry: tuple[Any, ...]) -> Any:
        return carry[1] < hi

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        row, begin, *rest = carry
        length, end = lengths[row], ends[row]
        first = first_tile(length, window)
        stop = jnp.where(length > 0, jnp.minimum(hi, end) - begin, 0)
        segment = Segment(
            row=row,
            length=length,
            first=first,
            begin=first + jnp.maximum(lo - begin, 0),
            end=first + stop,
            continues=(begin < lo).astype(jnp.int32),
            whole=(begin >= lo) & (end <= hi),
            first_block=owner(begin),
            last_block=owner(end - 1),
        )
        return (row + 1, end, *visit(segment, tuple(rest)))

    begin = ends[row] - tiles_of(lengths[row], window)
    return tuple(lax.while_loop(more, step, (row, begin, *state))[2:])
