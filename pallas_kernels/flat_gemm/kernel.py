"""The flat GEMM kernel: weights stream through shared memory once, the batch is wgmma's N.

So that no SM has more to read than another, the work is cut evenly to the last pipeline step: the
steps of all tiles form one sequence, and each block takes one contiguous part of it (stream-K). A
tile that is cut between blocks is summed by the last of them to arrive.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.flat_gemm.config import FlatConfig, padded_rows
from pallas_kernels.rms_norm.config import default_config as norm_config

_ACCUMULATORS = 64
"""Registers a thread may spend on partial sums in flight."""
_ROW_REGISTERS = 64
"""Registers a thread may spend on rows of x in flight, of whose squares the mean is taken."""


def _divide(number, by: int):
    """Quotient of numbers that are not negative; `//` of a traced one also tests the sign."""
    return number // by if isinstance(number, int) else lax.div(number, jnp.int32(by))


class Schedule:
    """Which steps each block takes; `first` and `owner` also work on traced numbers."""

    def __init__(self, tiles: int, steps: int, blocks: int) -> None:
        self.steps = steps
        """Pipeline steps of a tile."""
        self.total = tiles * steps
        self.blocks = min(blocks, self.total)

    def first(self, block):
        """First step of a block."""
        return _divide(block * self.total, self.blocks)

    def owner(self, step):
        """The block that a step belongs to."""
        return _divide((step + 1) * self.blocks - 1, self.total)

    @functools.cached_property
    def most_shares(self) -> int:
        """Most blocks that one tile is cut between."""
        starts = range(0, self.total, self.steps)
        return max(self.owner(s + self.steps - 1) - self.owner(s) + 1 for s in starts)


def _put_row_factors(x: Any, factors: Any, eps: float) -> None:
    """1 / sqrt(mean(x^2) + eps) of every row of x to shared memory; 0 past the last row.

    Every block does so for all rows, which it finds in the L2 cache; several are loaded at once.
    """
    rows, width = x.shape
    vector = norm_config(width, x.dtype.itemsize).vector
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=vector)
    at_once = max(1, _ROW_REGISTERS * 128 * 4 // (width * x.dtype.itemsize))
    for first in range(0, rows, at_once):
        some = range(first, min(first + at_once, rows))
        for row, values in [(row, mosaic.load(x.at[row], layout)) for row in some]:
            values = values.astype(jnp.float32)
            factors[row] = lax.rsqrt(jnp.sum(values * values) * (1 / width) + eps)
    for row in range(rows, factors.shape[0]):
        factors[row] = jnp.float32(0)
    plgpu.commit_smem()


def _body(
    *refs: Any,
    config: FlatConfig,
    schedule: Schedule,
    names: tuple[str, ...],
    k_major: bool,
    eps: float | None,
    interpret: Any,
):
    """One block. Weights are asked for before the kernel before this one is complete."""
    g = dict(zip(names, refs, strict=True))
    x, w, y, x_s, w_s, y_s = (g[name] for name in ("x", "w", "y", "x_s", "w_s", "y_s"))
    w_loaded, x_loaded = g["w_loaded"], g["x_loaded"]
    (rows, tile_n), halves = y_s.shape, w_s.shape[1]
    tile_k, stages, x_stages = config.tile_k, config.stages, config.x_stages
    steps, outputs = schedule.steps, y.shape[1]
    block = lax.axis_index("block")
    begin, end = schedule.first(block), schedule.first(block + 1)
    # A start that is not a constant lets the box of a copy reach over the array's edge: what is
    # read there is zero, what is written there is dropped.
    every_row = pl.ds(block * 0, rows)

    def load_w(step):
        slot, k = lax.rem(step - begin, stages), pl.ds(lax.rem(step, steps) * tile_k, tile_k)
        for half in range(halves):
            n = pl.ds(half * outputs + lax.div(step, steps) * tile_n, tile_n)
            tile = w.at[n, k] if k_major else w.at[k, n]
            plgpu.copy_gmem_to_smem(tile, w_s.at[slot, half], w_loaded.at[slot])

    def load_x(step):
        slot, k = lax.rem(step - begin, x_stages), pl.ds(lax.rem(step, steps) * tile_k, tile_k)
        plgpu.copy_gmem_to_smem(x.at[every_row, k], x_s.at[slot], x_loaded.at[slot])

    def when_due(load, step):
        pl.when(step < end)(functools.partial(load, step))

    def reload(step):
        """Fills the slots of a step whose products are done."""
        when_due(load_w, step + stages)
        when_due(load_x, step + x_stages)

    mosaic.let_next_start(interpret)
    for i in range(stages):
        when_due(load_w, begin + i)
    mosaic.wait_for_previous(interpret)
    for i in range(x_stages):
        when_due(load_x, begin + i)
    if "norm" in g:
        _put_row_factors(x, g["factors"], eps)

    def norm_weight(step):
        """The norm's weight for the inputs of a step, one number for each row of x_s^T."""
        k = pl.ds(lax.rem(step, steps) * tile_k, tile_k)
        return mosaic.load(g["norm"].at[k], plgpu.Layout.WGMMA_TRANSPOSED.reduce(1))

    def weigh(tile, weight):
        """Multiplies the norm's weight onto a tile of x, in its place."""
        turned = tile.transpose((1, 0))
        value = plgpu.load(turned, layout=plgpu.Layout.WGMMA_TRANSPOSED).astype(jnp.float32)
        weight = lax.broadcast_in_dim(weight.astype(jnp.float32), value.shape, [0])
        turned[...] = (value * weight).astype(x.dtype)
        plgpu.commit_smem()

    def multiply(low, high, *accumulators):
        """Sums of the steps from `low` to `high`, all of one tile."""

        def step(i, _):
            slot, x_slot = lax.rem(i - begin, stages), lax.rem(i - begin, x_stages)
            # Asked for before the waits, so that they hide its latency.
            weight = norm_weight(i) if "norm" in g else None
            plgpu.barrier_wait(x_loaded.at[x_slot])
            if weight is not None:
                weigh(x_s.at[x_slot], weight)
            plgpu.barrier_wait(w_loaded.at[slot])
            for half, acc in enumerate(accumulators):
                tile = w_s.at[slot, half]
                tile = tile if k_major else tile.transpose((1, 0))
                plgpu.wgmma(acc, tile, x_s.at[x_slot].transpose((1, 0)))
            plgpu.wgmma_wait(halves)  # the step before is done
            pl.when(i > low)(functools.partial(reload, i - 1))
            return ()

        lax.fori_loop(low, high, step, ())
        plgpu.wgmma_wait(0)
        return tuple(acc[...] for acc in accumulators)

    def normed(sums):
        if "norm" not in g:
            return sums
        factors = plgpu.load(g["factors"], layout=plgpu.Layout.WGMMA.reduce(0))
        return sums * lax.broadcast_in_dim(factors, sums.shape, [1])

    def biased(half, tile, sums):
        if "bias" not in g:
            return sums
        here = pl.ds(half * outputs + tile * tile_n, tile_n)
        bias = mosaic.load(g["bias"].at[here], plgpu.Layout.WGMMA.reduce(1))
        return sums + lax.broadcast_in_dim(bias.astype(jnp.float32), sums.shape, [0])

    def store(tile, sums):
        here = (every_row, pl.ds(tile * tile_n, tile_n))
        turned = y_s.transpose((1, 0))
        sums = [biased(half, tile, normed(value)) for half, value in enumerate(sums)]
        out = sums[0]
        if halves == 2:
            out = out / (1.0 + jnp.exp(-out)) * sums[1]
        out = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
        if "residual" in g:
            before = plgpu.load(turned, layout=plgpu.Layout.WGMMA_TRANSPOSED)
            out = out + before.astype(jnp.float32)
        turned[...] = out.astype(y.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_s, y.at[*here])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def share(tile, sums):
        """Puts this block's part of a tile down; the last block to come adds all parts up.

        The parts are added in their order, so that the sum is the same whoever comes last. A block
        has at most one part that begins a tile (slot 1) and one that does not (slot 0).
        """
        partial, counter = g["partial"], g["counters"].at[tile]
        owner, last = schedule.owner(tile * steps), schedule.owner(tile * steps + steps - 1)
        slot = (owner == block).astype(jnp.int32)
        for half in range(halves):
            mosaic.store(partial.at[block, slot, half], sums[half])

        def total(half):
            def part(i, first=0):
                at = partial.at[owner + i, first, half]
                return mosaic.load(at, plgpu.Layout.WGMMA)

            most, ahead = schedule.most_shares, max(2, 128 * _ACCUMULATORS // (tile_n * rows))
            if most <= ahead:  # all at once; past the last part, that part without weight
                parts = [part(jnp.minimum(i, last - owner)) for i in range(1, most)]
                out = part(0, 1)
                for i, value in enumerate(parts, 1):
                    used = lax.broadcast_in_dim(i <= last - owner, value.shape, [])
                    out = out + jnp.where(used, value, 0.0)
                return out
            return lax.fori_loop(1, last - owner + 1, lambda i, out: out + part(i), part(0, 1))

        ticket = mosaic.take_ticket(counter, g["ticket"], interpret=interpret)

        @pl.when(ticket == last - owner)
        def _():
            counter[...] = 0
            store(tile, tuple(total(half) for half in range(halves)))

    def segment(tile, _):
        low, high = jnp.maximum(begin, tile * steps), jnp.minimum(end, (tile + 1) * steps)
        if "residual" in g:  # into the output's place, where it is added to
            here = g["residual"].at[every_row, pl.ds(tile * tile_n, tile_n)]
            plgpu.copy_gmem_to_smem(here, y_s, g["residual_loaded"])
        shape = plgpu.ACC((tile_n, rows), jnp.float32)
        sums = pl.run_scoped(functools.partial(multiply, low, high), *[shape] * halves)
        reload(high - 1)
        if "residual" in g:
            plgpu.barrier_wait(g["residual_loaded"])
        if schedule.most_shares == 1:
            store(tile, sums)
        else:
            whole = high - low == steps
            pl.when(whole)(functools.partial(store, tile, sums))
            pl.when(jnp.logical_not(whole))(functools.partial(share, tile, sums))
        return ()

    lax.fori_loop(lax.div(begin, steps), lax.div(end - 1, steps) + 1, segment, ())


def schedule_of(config: FlatConfig, outputs: int, inputs: int) -> Schedule:
    """How the blocks share the work of a product."""
    tiles, steps = pl.cdiv(outputs, config.tile_n), pl.cdiv(inputs, config.tile_k)
    blocks = tiles * config.split if config.split else mosaic.sm_count()
    return Schedule(tiles, steps, blocks)


def run(x, w, bias, residual, norm, counters, *, config, gated, k_major, eps, interpret):
    """Launches the kernel; arguments are checked by the caller."""
    rows, halves = padded_rows(x.shape[0]), 1 + gated
    outputs = w.shape[0 if k_major else 1] // halves
    schedule = schedule_of(config, outputs, x.shape[1])
    weight_tile = (config.tile_n, config.tile_k) if k_major else (config.tile_k, config.tile_n)
    x_tiled, w_tiled, y_tiled = (
        mosaic.tiled(x.dtype, minor) for minor in (config.tile_k, weight_tile[1], config.tile_n)
    )
    cut = schedule.most_shares > 1
    operands = {"x": x, "w": w, "bias": bias, "residual": residual, "norm": norm}
    operands["counters"] = counters if cut else None
    operands = {name: value for name, value in operands.items() if value is not None}
    results = {"y": jax.ShapeDtypeStruct((x.shape[0], outputs), x.dtype)}
    if cut:
        parts = (schedule.blocks, 2, halves, config.tile_n, rows)
        results["partial"] = jax.ShapeDtypeStruct(parts, jnp.float32)
    stages = config.stages
    scratch = {
        "x_s": plgpu.SMEM((config.x_stages, rows, config.tile_k), x.dtype, transforms=x_tiled),
        "w_s": plgpu.SMEM((stages, halves, *weight_tile), w.dtype, transforms=w_tiled),
        "y_s": plgpu.SMEM((rows, config.tile_n), x.dtype, transforms=y_tiled),
        "w_loaded": plgpu.Barrier(num_arrivals=halves, num_barriers=stages),
        "x_loaded": plgpu.Barrier(num_barriers=config.x_stages),
    }
    if residual is not None:
        scratch["residual_loaded"] = plgpu.Barrier()
    if norm is not None:
        scratch["factors"] = plgpu.SMEM((rows,), jnp.float32)
    if cut:
        scratch["ticket"] = plgpu.SMEM((1,), jnp.int32)
    out = plgpu.kernel(
        functools.partial(
            _body,
            config=config,
            schedule=schedule,
            names=(*operands, *results, *scratch),
            k_major=k_major,
            eps=eps,
            interpret=interpret,
        ),
        out_type=tuple(results.values()),
        scratch_types=tuple(scratch.values()),
        grid=(schedule.blocks,),
        grid_names=("block",),
        compiler_params=mosaic.WARPGROUP,
        kernel_name="flat_gemm",
        **({} if interpret is None else {"interpret": interpret}),
    )(*operands.values())
    return out[0]
