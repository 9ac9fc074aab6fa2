"""The packed output of the signalling GEMM, and maps between it and the row-major matrix.

Of y `[M, N]`, whose rows are `ranks` equal blocks (one for each receiver), tile t holds
`part_m = tile_m / ranks` rows of every block and `tile_n` columns. The packed buffer is
`[tiles * ranks, part_m, tile_n]`, ordered by group, then by rank, then by tile: a group is one
contiguous range, and in it so is each rank's share. Hence one stock collective a group does:

- all-reduce (`ranks` = 1): slot t is tile t; the sum has the same layout.
- reduce-scatter: rank r gets, group after group, `[tiles of the group, part_m, tile_n]`: together
  `[tiles, part_m, tile_n]` in the order of tiles, which `unpack(..., ranks=1)` turns into its
  contiguous block of M / ranks rows, as `lax.psum_scatter` has it.
- all-to-all: what arrives, put by group, then by source, is laid out like what was sent;
  `unpack` with the same `ranks` yields `lax.all_to_all(tiled=True)` over rows.

Rows and columns past the edge of a block or of y fill its last tiles with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.signal_gemm import schedule
from pallas_kernels.signal_gemm.config import SignalConfig


class Span(NamedTuple):
    """A range of elements of the packed buffer."""

    offset: int
    size: int


def tile_grid(m: int, n: int, config: SignalConfig, ranks: int = 1) -> tuple[int, int]:
    """Tiles along M and along N.

    Raises:
      ValueError: M is not a multiple of `ranks`.
    """
    if ranks < 1 or m % ranks:
        raise ValueError(f"M = {m} is not a multiple of {ranks} ranks")
    return -(-(m // ranks) // config.part_m(ranks)), -(-n // config.tile_n)


def tile_count(m: int, n: int, config: SignalConfig, ranks: int = 1) -> int:
    """Tiles of y: what `groups` must sum to."""
    rows, columns = tile_grid(m, n, config, ranks)
    return rows * columns


def packed_shape(m: int, n: int, config: SignalConfig, ranks: int = 1) -> tuple[int, int, int]:
    """Shape of the packed buffer of y `[M, N]`: `[tiles * ranks, part_m, tile_n]`."""
    return tile_count(m, n, config, ranks) * ranks, config.part_m(ranks), config.tile_n


def tile_position(
    tile: int, m: int, n: int, config: SignalConfig, ranks: int = 1
) -> tuple[int, int]:
    """First row (in the block of each rank) and first column of y that tile `tile` holds."""
    row, column = _order(*tile_grid(m, n, config, ranks), config)[tile]
    return int(row) * config.part_m(ranks), int(column) * config.tile_n


def slots(groups: Sequence[int], ranks: int = 1) -> np.ndarray:
    """`[tiles, ranks]` int32: the slot of the packed buffer where each part of each tile lies."""
    found = []
    for start, size in zip(schedule.starts_of(groups), groups, strict=True):
        numbers = start * ranks + np.arange(ranks * size, dtype=np.int32)
        found.append(numbers.reshape(ranks, size).T)
    return np.concatenate(found)


def group_spans(groups: Sequence[int], config: SignalConfig) -> list[Span]:
    """Where each group lies in the packed buffer; its ranks' shares are equal parts of it."""
    tile = config.tile_m * config.tile_n
    starts = schedule.starts_of(groups)
    return [Span(start * tile, size * tile) for start, size in zip(starts, groups, strict=True)]


def unpack(
    packed: jax.Array,
    m: int,
    n: int,
    config: SignalConfig,
    *,
    groups: Sequence[int] | None = None,
    ranks: int = 1,
) -> jax.Array:
    """The row-major matrix that a packed buffer holds.

    Args:
      packed: `[tiles * ranks, part_m, tile_n]`. With `ranks` = 1: the result of an all-reduce, or
        what one rank got of a reduce-scatter, whose `part_m` is that of the sender.
      m: rows of the matrix; of a reduce-scatter those of the receiver's block.
      n: columns of the matrix.
      config: how the sender cut its product up.
      groups: tiles of each group; needed where `ranks` > 1.
      ranks: blocks of rows in the buffer.

    Returns:
      `[m, n]`.

    Raises:
      ValueError: the buffer's shape is not that of such a matrix, or groups do not fit.
    """
    part_m = packed.shape[1]
    rows, columns = _parts(m, n, part_m, config, ranks)
    if packed.shape != (rows * columns * ranks, part_m, config.tile_n):
        raise ValueError(f"packed is {packed.shape}: no {m}x{n} of {ranks} ranks by {config}")
    where = _where(rows, columns, config, groups, ranks)
    tiles = packed[where].transpose(0, 1, 3, 2, 4)  # ranks, rows of tiles, part_m, columns, tile_n
    blocks = tiles.reshape(ranks, rows * part_m, columns * config.tile_n)
    return blocks[:, : m // ranks, :n].reshape(m, n)


def pack(
    y: jax.Array,
    config: SignalConfig,
    *,
    groups: Sequence[int] | None = None,
    ranks: int = 1,
) -> jax.Array:
    """The packed buffer of y `[M, N]`: the inverse of `unpack`, zeros past the edges.

    Raises:
      ValueError: M is not a multiple of `ranks`, or groups do not fit.
    """
    m, n = y.shape
    rows, columns = tile_grid(m, n, config, ranks)
    part_m, tile_n = config.part_m(ranks), config.tile_n
    blocks = y.reshape(ranks, m // ranks, n)
    over = ((0, 0), (0, rows * part_m - m // ranks), (0, columns * tile_n - n))
    tiles = jnp.pad(blocks, over).reshape(ranks, rows, part_m, columns, tile_n)
    where = _where(rows, columns, config, groups, ranks)
    empty = jnp.zeros((rows * columns * ranks, part_m, tile_n), y.dtype)
    return empty.at[where].set(tiles.transpose(0, 1, 3, 2, 4))


def _order(rows: int, columns: int, config: SignalConfig) -> np.ndarray:
    return schedule.tile_order(rows, columns, config.grid_minor, config.grid_tile_width)


def _parts(m: int, n: int, part_m: int, config: SignalConfig, ranks: int) -> tuple[int, int]:
    if ranks < 1 or m % ranks:
        raise ValueError(f"M = {m} is not a multiple of {ranks} ranks")
    return -(-(m // ranks) // part_m), -(-n // config.tile_n)


def _where(rows: int, columns: int, config: SignalConfig, groups, ranks: int) -> np.ndarray:
    """`[ranks, rows, columns]`: slot of each part of the matrix."""
    tiles = rows * columns
    if groups is None:
        if ranks > 1:
            raise ValueError(f"groups are needed to find the shares of {ranks} ranks")
        groups = (tiles,)
    schedule.check_groups(groups, tiles)
    row, column = _order(rows, columns, config).T
    where = np.empty((ranks, rows, columns), np.int32)
    where[:, row, column] = slots(groups, ranks).T
    return where
