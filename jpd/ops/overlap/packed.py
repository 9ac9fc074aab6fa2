"""Results in the order in which their tiles were sent, and what reads them.

A GEMM that signals stores its tiles group after group, not row after row (FlashOverlap, arXiv
2504.19519, section 3.3). Whoever reads the result puts it in order again: `rms_norm_residual` while
it reads it anyway (section 3.3.5 of the paper), `unpack` in a pass of its own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpd.ops.norm import rms_norm_xla


@dataclass(frozen=True)
class Layout:
    """Where the parts of a matrix `[m, n]` lie in a packed buffer; see
    `pallas_kernels.signal_gemm.layout`."""

    m: int
    """Rows of the matrix: of a reduce-scatter those that this rank got."""
    n: int
    part_m: int
    """Rows of a part, the unit that is sent to one rank."""
    config: Any
    """The `SignalConfig` that cut the product up."""
    groups: tuple[int, ...]
    """Tiles of each group."""
    ranks: int = 1
    """Blocks of rows in the buffer: the senders of an all-to-all, else 1."""

    def where(self) -> np.ndarray:
        """`[ranks, rows, columns]`: which slot of the buffer holds which part of the matrix."""
        from pallas_kernels.signal_gemm import layout, schedule

        rows, columns = -(-(self.m // self.ranks) // self.part_m), -(-self.n // self.config.tile_n)
        schedule.check_groups(self.groups, rows * columns)
        order = schedule.tile_order(
            rows, columns, self.config.grid_minor, self.config.grid_tile_width
        )
        where = np.empty((self.ranks, rows, columns), np.int32)
        where[:, order[:, 0], order[:, 1]] = layout.slots(self.groups, self.ranks).T
        return where


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["layout"])
@dataclass(frozen=True)
class Packed:
    """A matrix as it was sent. A pytree, so that it may leave a `jit`, not a `shard_map`."""

    data: jax.Array
    """`[parts, part_m, tile_n]`."""
    layout: Layout


def unpack(y: Packed | jax.Array) -> jax.Array:
    """The matrix `[M, N]` in the order of its rows; an array is returned as it is.

    A gather of runs of `tile_n` numbers, whose indices follow from a table of one number a tile.

    Raises:
      ValueError: the buffer has another shape than its layout says.
    """
    if not isinstance(y, Packed):
        return y
    layout, tile_n = y.layout, y.layout.config.tile_n
    where = layout.where()
    if y.data.shape != (where.size, layout.part_m, tile_n):
        raise ValueError(f"the buffer is {y.data.shape}, which is not {layout}")
    ranks, _, columns = where.shape
    within = jnp.arange(layout.part_m, dtype=jnp.int32)[:, None]
    rows = jnp.asarray(where)[:, :, None] * layout.part_m + within
    rows = rows.reshape(ranks, -1, columns)[:, : layout.m // ranks].reshape(layout.m, columns)
    runs = y.data.reshape(-1, tile_n).at[rows]
    found = runs.get(mode="promise_in_bounds", unique_indices=True, wrap_negative_indices=False)
    return found.reshape(layout.m, -1)[:, : layout.n]


def rms_norm_residual(
    y: Packed | jax.Array, residual: jax.Array, weight: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Adds the residual stream and norms the sum; reads packed results where they lie.

    What follows an attention or an MLP whose output weight is split over ranks. The gather is part
    of the program that adds and norms, for XLA to fuse.

    Args:
      y: `[M, N]`, packed or not.
      residual: `[M, N]`.
      weight: `[N]` of the norm.
      eps: added to the mean square.

    Returns:
      The normed sum and the sum, both `[M, N]`.

    Raises:
      ValueError: shapes that do not fit together.
    """
    shape = (y.layout.m, y.layout.n) if isinstance(y, Packed) else y.shape
    if residual.shape != shape or weight.shape != shape[1:]:
        raise ValueError(f"y {shape}, residual {residual.shape}, weight {weight.shape}")
    total = residual + unpack(y)
    return rms_norm_xla(total, weight, eps), total
