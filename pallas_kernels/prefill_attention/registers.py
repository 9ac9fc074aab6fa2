"""What is done on the registers of a wgmma result directly.

Written with the layout of `plgpu.Layout.WGMMA` at hand, so that the compiler sees a constant where
iotas would give it one number to keep an element: those took the registers of the kernel's loop.
The interpreter has none of this; `kernel.py` has the same in jax.numpy for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

_WGMMA, _SPLAT = plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT


def _constant(value: float, kind: ir.Type) -> ir.Value:
    return mgpu.utils.c(value, kind)


def _first_place() -> tuple[ir.Value, ir.Value]:
    """Row and column (int32) of the first element that this thread holds."""
    i32 = ir.IntegerType.get_signless(32)
    thread = arith.remui(mgpu.utils.thread_idx(), _constant(mgpu.utils.WARPGROUP_SIZE, i32))
    warp = arith.divui(thread, _constant(32, i32))
    lane = arith.remui(thread, _constant(32, i32))
    row = arith.addi(arith.muli(warp, _constant(16, i32)), arith.divui(lane, _constant(4, i32)))
    column = arith.muli(arith.remui(lane, _constant(4, i32)), _constant(2, i32))
    return row, column


def _pairs(value: Any) -> Iterator[tuple[tuple[int, ...], int, int, ir.Value]]:
    """Every register, two neighbours of a row: its index, and how many rows further down and
    columns further right than the thread's first it is."""
    columns = value.shape[1]
    strides = value.layout.tiling.tile_strides((columns, 1))
    for index, pair in np.ndenumerate(value.registers):
        below, right = divmod(sum(i * n for i, n in zip(index, strides, strict=True)), columns)
        yield index, below, right, pair


def mask_scores(
    scores: jax.Array, base: jax.Array, *, window: int | None, masked: float
) -> jax.Array:
    """Scores `[64, keys]` with `masked` for the keys that a row does not see.

    Row r sees key c where `c - r <= base`, and with a window only where `c - r > base - window`.
    """

    @plgpu.inline_mgpu(
        arg_types=(_WGMMA, _SPLAT),
        return_type=plgpu.ShapeDtypeStruct(scores.shape, jnp.float32, _WGMMA),
    )
    def select(ctx, scores, base):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        row, column = _first_place()
        edge = arith.addi(base.registers.item(), arith.subi(row, column))
        other = _constant(masked, ir.F32Type.get())
        results = scores.registers.copy()
        for index, below, right, pair in _pairs(scores):
            for i in range(2):
                # The row's last key that is seen, less this element's constant column.
                number = _constant(right + i - below, i32)
                seen = arith.cmpi(arith.CmpIPredicate.sle, number, edge)
                if window is not None:
                    start = arith.subi(edge, _constant(window, i32))
                    after = arith.cmpi(arith.CmpIPredicate.sgt, number, start)
                    seen = arith.andi(seen, after)
                score = vector.extract(pair, dynamic_position=[], static_position=[i])
                score = arith.select(seen, score, other)
                results[index] = vector.insert(
                    score, results[index], dynamic_position=[], static_position=[i]
                )
        return mgpu.FragmentedArray(_registers=results, _layout=scores.layout, _is_signed=None)

    return select(scores, base)


def store_rows(value: jax.Array, target: Any, first: jax.Array, last: jax.Array) -> None:
    """Stores the rows `first <= row < last` of a 16-bit `[64, D]` to the GMEM ref `target`.

    TMA cannot: tiled shared memory is cut at multiples of 8 rows only.
    """

    @plgpu.inline_mgpu(arg_types=(_WGMMA, plgpu.RefType(), _SPLAT, _SPLAT))
    def store(ctx, value, target, first, last):
        del ctx
        utils = mgpu.utils
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        first, last = first.registers.item(), last.registers.item()
        (pitch, _), _ = ir.MemRefType(target.type).get_strides_and_offset()
        row, column = _first_place()
        offset = arith.addi(
            arith.muli(arith.extui(i64, row), _constant(pitch, i64)), arith.extui(i64, column)
        )
        start = utils.getelementptr(utils.memref_ptr(target), [offset], value.mlir_dtype)
        own = {}
        for _, below, right, pair in _pairs(value):
            if below not in own:
                number = arith.addi(row, _constant(below, i32))
                own[below] = arith.andi(
                    arith.cmpi(arith.CmpIPredicate.sge, number, first),
                    arith.cmpi(arith.CmpIPredicate.slt, number, last),
                )
            utils.inline_ptx(
                f"st.global.b32 [$0 + {2 * (below * pitch + right)}], $1;",
                start,
                utils.bitcast(pair, i32),
                predicate=own[below],
                has_side_effects=True,
            )

    store(value, target, first, last)
