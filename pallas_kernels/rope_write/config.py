"""How heads are cut into blocks, and how a block's heads lie in the registers of a warpgroup.

A block turns some heads of one token. Element i of a head meets element i + D/2, so a block holds
the left and the right halves as two `[heads, D/2]` arrays of one layout, and nothing is exchanged
between threads.
"""

from __future__ import annotations

import dataclasses

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic import gpu as mgpu

MAX_HEADS_OF_BLOCK = 16
_WARPS, _LANES = 4, 32


@dataclasses.dataclass(frozen=True)
class RopeWriteConfig:
    """Heads that one block handles; each divides its number of heads."""

    query_heads: int
    kv_heads: int


def _power_of_two_in(number: int) -> int:
    return number & -number


def default_config(num_heads: int, num_kv_heads: int) -> RopeWriteConfig:
    """The largest power of two that divides the heads, up to 16: two 16-byte loads a thread."""
    return RopeWriteConfig(
        min(MAX_HEADS_OF_BLOCK, _power_of_two_in(num_heads)),
        min(MAX_HEADS_OF_BLOCK, _power_of_two_in(num_kv_heads)),
    )


def layout(heads: int, half: int) -> plgpu.Layout:
    """Registers of a `[heads, half]` array: neighbouring lanes hold neighbouring columns.

    Threads take 8 elements (16 bytes) where that leaves work for all of them, fewer for few heads,
    and hold copies where 2 are too many still.

    Args:
      heads: a power of two.
      half: half of the head size, a multiple of 8.
    """
    columns = _power_of_two_in(half)
    vector = next((v for v in (8, 4) if heads * columns // v >= _WARPS * _LANES), 2)
    columns = min(columns, _LANES * vector)
    column_lanes = columns // vector
    rows = min(heads, _LANES // column_lanes)
    warps = min(_WARPS, heads // rows)
    tiled = mgpu.TiledLayout(
        plgpu.Tiling(((warps * rows, columns), (rows, columns), (1, vector))),
        warp_dims=_with_copies((-6,), warps, _WARPS),
        lane_dims=_with_copies((-4, -3), rows * column_lanes, _LANES),
        vector_dim=-1,
        _check_canonical=False,
    ).canonicalize()
    return plgpu.Layout.TILED(tiled.tiling, tiled.warp_dims, tiled.lane_dims, tiled.vector_dim)


def _with_copies(dims: tuple[int, ...], size: int, wanted: int) -> tuple:
    return dims if size == wanted else (*dims, plgpu.Replicated(wanted // size))
