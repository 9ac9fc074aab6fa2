"""The norm of a residual stream to which a sum over ranks is added while it is read.

A GEMM that signals leaves its result tile after tile, in the order in which it was sent. Here each
row gathers its pieces of these tiles, so that nobody has to put the matrix in order before.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import checks, mosaic
from pallas_kernels.checks import DTYPES
from pallas_kernels.rms_norm.config import default_config
from pallas_kernels.rms_norm.kernel import normed
from pallas_kernels.signal_gemm.config import SignalConfig


def rms_norm_residual(
    y: jax.Array,
    residual: jax.Array,
    weight: jax.Array,
    *,
    eps: float,
    tiling: SignalConfig | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """`rms_norm(y + residual)` and `y + residual`, all read and written once.

    With `tiling` this is the post-communication reordering of FlashOverlap (arXiv 2504.19519,
    section 3.3.5): which tile holds what follows from its number in closed form, so that no table
    is read.

    Args:
      y: `[M, E]` bf16 or fp16; with `tiling` `[tiles, part_m, tile_n]`, the packed buffer of
        `signal_gemm` after an all-reduce, or what one rank got of a reduce-scatter.
      residual: `[M, E]` of the same dtype, E a multiple of 128 up to 16384.
      weight: `[E]` likewise. It is read before earlier kernels end: it must be none's output.
      eps: added to the mean of the squares.
      tiling: how the product was cut up, if y is in tiles.
      interpret: `plgpu.InterpretGPUParams` runs it on the CPU.

    Returns:
      The norm as of `rms_norm`, of the sum as it was rounded, and the sum, both `[M, E]`.

    Raises:
      NotImplementedError: the width or the dtype is not supported, or there are no rows.
      ValueError: the shapes do not fit together, or eps is not a number of at least 0.
    """
    if residual.ndim != 2 or weight.shape != residual.shape[1:]:
        raise ValueError(
            f"residual {residual.shape} and weight {weight.shape}: [M, E] and [E] are expected"
        )
    if y.dtype.name not in DTYPES or {residual.dtype, weight.dtype} != {y.dtype}:
        raise NotImplementedError(
            f"y {y.dtype}, residual {residual.dtype} and weight {weight.dtype}: all of one of "
            f"{', '.join(DTYPES)}"
        )
    m, width = residual.shape
    checks.not_empty(M=m)
    checks.positive(eps=eps, or_zero=True)
    if tiling is None:
        if y.shape != residual.shape:
            raise ValueError(f"y {y.shape} and residual {residual.shape}: one shape is expected")
    else:
        rows, columns = _grid(y, residual, tiling)
        if y.shape[0] != rows * columns or y.shape[2:] != (tiling.tile_n,):
            raise ValueError(f"y is {y.shape}: no {m}x{width} by {tiling}")
    default_config(width, y.dtype.itemsize)  # says which widths there are
    return _call(y, residual, weight, eps=float(eps), tiling=tiling, interpret=interpret)


def _grid(tiles: jax.Array, residual: jax.Array, tiling: SignalConfig) -> tuple[int, int]:
    """Rows and columns of tiles."""
    m, width = residual.shape
    return -(-m // tiles.shape[1]), -(-width // tiling.tile_n)


def tile_number(row: Any, column: Any, grid: tuple[int, int], tiling: SignalConfig) -> Any:
    """Number of a tile in the order of completion: the inverse of `signal_gemm`'s `tile_order`.

    Args:
      row: of the matrix of tiles, an int or int32s; so is `column`.
      column: see there.
      grid: rows and columns of tiles.
      tiling: the order.
    """
    rows, columns = grid
    minor, major = (row, column) if tiling.grid_minor == "m" else (column, row)
    minors, majors = (rows, columns) if tiling.grid_minor == "m" else (columns, rows)
    band = minor // tiling.grid_tile_width
    first = band * tiling.grid_tile_width
    width = jnp.minimum(tiling.grid_tile_width, minors - first)
    # Every other band is walked backwards.
    along = major + band % 2 * (majors - 1 - 2 * major)
    return first * majors + along * width + minor - first


@functools.partial(jax.jit, static_argnames=("eps", "tiling", "interpret"))
def _call(y, residual, weight, *, eps, tiling, interpret):
    (rows, width), dtype = residual.shape, residual.dtype
    vector = default_config(width, dtype.itemsize).vector
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=vector)
    if tiling is not None:
        grid, part_m = _grid(y, residual, tiling), y.shape[1]
        in_tile = tiling.tile_n // vector  # tile_n is a multiple of 64: no vector is in two tiles
        y = y.reshape(-1, vector)

    def place(row, number):
        """Where in y vector `number` of a row is."""
        tile = tile_number(lax.div(row, part_m), lax.div(number, in_tile), grid, tiling)
        return (tile * part_m + lax.rem(row, part_m)) * in_tile + lax.rem(number, in_tile)

    def body(y_ref, residual_ref, weight_ref, normed_ref, sum_ref):
        row = lax.axis_index("row")
        mosaic.let_next_start(interpret)
        scale = plgpu.load(weight_ref, layout=layout, optimized=False)
        mosaic.wait_for_previous(interpret)
        before = plgpu.load(residual_ref.at[row], layout=layout, optimized=False)
        if tiling is None:
            part = plgpu.load(y_ref.at[row], layout=layout, optimized=False)
        else:
            part = mosaic.gather(y_ref, width, functools.partial(place, row), interpret=interpret)
        total = (before.astype(jnp.float32) + part.astype(jnp.float32)).astype(dtype)
        sum_ref[row] = total
        normed_ref[row] = normed(total, scale, eps)

    shape = jax.ShapeDtypeStruct(residual.shape, dtype)
    return plgpu.kernel(
        body,
        out_type=(shape, shape),
        grid=(rows,),
        grid_names=("row",),
        compiler_params=mosaic.WARPGROUP,
        kernel_name="rms_norm_residual",
        **({} if interpret is None else {"interpret": interpret}),
    )(y, residual, weight)
