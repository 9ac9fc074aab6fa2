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
from pallas_kernels.flat_gemm.schedule import Schedule, divide, schedule_of

_LOADS, _LOADS_ALONE = 64, 128
"""Registers a thread may spend on partial sums in flight and their sum; where few threads share
the SM's."""
_HELD = 32
"""Registers a thread may spend on another block's partial sums while it still multiplies."""
_LOOK_BYTES = 48 * 1024
"""Weights that a block still has to load when it looks for the other part of its last tile."""
_WRITE_BYTES = 48 * 1024
"""Weights that a block loads while another's partial sums and ticket become visible."""


def _this_block() -> jax.Array:
    return lax.axis_index("block")


def _body(
    *refs: Any,
    config: FlatConfig,
    schedule: Schedule,
    names: tuple[str, ...],
    k_major: bool,
    interpret: Any,
):
    """One block: a warpgroup that loads, and `config.consumers` that multiply and finish tiles.

    Weights are asked for before the kernel before this one is complete. Loads go on while a tile
    that is cut between blocks is put down and added up. A step's position is its place in the order
    in which the block takes its steps, from the last to the first.
    """
    g = dict(zip(names, refs, strict=True))
    x, w, y, x_s, w_s, y_s = (g[name] for name in ("x", "w", "y", "x_s", "w_s", "y_s"))
    full, empty = g["full"], g["empty"]
    (_, rows, part_n), halves = y_s.shape, w_s.shape[2]
    tile_n, tile_k, stages = config.tile_n, config.tile_k, config.stages
    x_stages = x_s.shape[0]
    steps, outputs = schedule.steps, y.shape[1]
    block, me = _this_block(), lax.axis_index("warpgroup")
    begin, end = schedule.first(block), schedule.first(block + 1)
    count = end - begin
    # A start that is not a constant lets the box of a copy reach over the array's edge: what is
    # read there is zero, what is written there is dropped.
    every_row = pl.ds(block * 0, rows)

    def mine(tile):
        """Outputs of this warpgroup."""
        return pl.ds(tile * tile_n + me * part_n, part_n)

    # --- the warpgroup that loads ---------------------------------------------------------------

    def slot_of(i, stages=stages):
        return i % stages if isinstance(i, int) else lax.rem(i, jnp.int32(stages))

    def load_w(i):
        step = end - 1 - i
        k = pl.ds(lax.rem(step, steps) * tile_k, tile_k)
        for consumer in range(config.consumers):
            for half in range(halves):
                first = half * outputs + lax.div(step, steps) * tile_n + consumer * part_n
                n = pl.ds(first, part_n)
                tile, slot = w.at[n, k] if k_major else w.at[k, n], slot_of(i)
                plgpu.copy_gmem_to_smem(tile, w_s.at[slot, consumer, half], full.at[slot])

    def load_x(i):
        k = pl.ds(lax.rem(end - 1 - i, steps) * tile_k, tile_k)
        tile, slot = x.at[every_row, k], slot_of(i)
        plgpu.copy_gmem_to_smem(tile, x_s.at[slot_of(i, x_stages)], full.at[slot])

    def produce():
        mosaic.let_next_start(interpret)
        for i in range(stages):
            pl.when(i < count)(functools.partial(load_w, i))
        mosaic.wait_for_previous(interpret)
        for i in range(x_stages):
            pl.when(i < count)(functools.partial(load_x, i))

        def step(i, _):
            plgpu.barrier_wait(empty.at[slot_of(i)])
            pl.when(i + x_stages < count)(functools.partial(load_x, i + x_stages))
            pl.when(i + stages < count)(functools.partial(load_w, i + stages))
            return ()

        lax.fori_loop(0, count, step, ())

    # Steps that take as long as it takes to look, and to be seen.
    step_bytes = tile_n * tile_k * halves * x.dtype.itemsize
    look_steps, write_steps = pl.cdiv(_LOOK_BYTES, step_bytes), pl.cdiv(_WRITE_BYTES, step_bytes)
    looking = schedule.ever_sees(look_steps, write_steps)
    held = halves if halves * part_n * rows // 128 <= _HELD else 0

    # --- the others -----------------------------------------------------------------------------

    def owners(tile):
        """The blocks that have the first and the last step of a tile."""
        return schedule.owner(tile * steps), schedule.owner(tile * steps + steps - 1)

    def counter_of(tile):
        return g["counters"].at[tile * config.consumers + me]

    def part_of(number, first, half):
        """A block's partial sums, of the tile that it has the first steps of or of another."""
        return mosaic.load(g["partial"].at[number, first, me, half], plgpu.Layout.WGMMA)

    def multiply(first, look_at, last, look, *accumulators):
        """Sums of the steps at positions from `first` to `last`, all of one tile.

        Also what `look` returns, which is called before the step at `look_at`.
        """

        def step(i, _):
            slot, x_slot = slot_of(i), slot_of(i, x_stages)
            plgpu.barrier_wait(full.at[slot])
            for half, acc in enumerate(accumulators):
                tile = w_s.at[slot, me, half]
                tile = tile if k_major else tile.transpose((1, 0))
                plgpu.wgmma(acc, tile, x_s.at[x_slot].transpose((1, 0)))
            plgpu.wgmma_wait(halves)  # the step before is done
            before = empty.at[slot_of(i + stages - 1)]
            pl.when(i > first)(functools.partial(plgpu.barrier_arrive, before))
            return ()

        seen = None
        if look is None:
            lax.fori_loop(first, last, step, ())
        else:
            lax.fori_loop(first, look_at, step, ())
            plgpu.wgmma_wait(0)
            seen = look()
            lax.fori_loop(look_at, last, step, ())
        plgpu.wgmma_wait(0)
        return tuple(acc[...] for acc in accumulators), seen

    def biased(half, tile, sums):
        if "bias" not in g:
            return sums
        # A part past the last output reads some other bias, and what it computes is dropped.
        first = half * outputs + jnp.minimum(tile * tile_n + me * part_n, outputs - part_n)
        here = pl.ds(first, part_n)
        bias = mosaic.load(g["bias"].at[here], plgpu.Layout.WGMMA.reduce(1))
        return sums + lax.broadcast_in_dim(bias.astype(jnp.float32), sums.shape, [0])

    def store(tile, sums):
        turned = y_s.at[me].transpose((1, 0))
        sums = [biased(half, tile, value) for half, value in enumerate(sums)]
        out = sums[0]
        if halves == 2:
            out = out / (1.0 + jnp.exp(-out)) * sums[1]
        out = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
        if "residual" in g:
            before = plgpu.load(turned, layout=plgpu.Layout.WGMMA_TRANSPOSED)
            out = out + before.astype(jnp.float32)
        turned[...] = out.astype(y.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_s.at[me], y.at[every_row, mine(tile)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def share(tile, sums):
        """Puts this block's part of a tile down; the last block to come adds all parts up.

        The parts are added in their order, so that the sum is the same whoever comes last. A block
        has at most one part that begins a tile (slot 1) and one that does not (slot 0).
        """
        owner, last = owners(tile)
        slot = (owner == block).astype(jnp.int32)
        for half in range(halves):
            mosaic.store(g["partial"].at[block, slot, me, half], sums[half])
        others = last - owner
        # Registers of a thread that loads in flight may take beside the sum.
        room = _LOADS_ALONE if config.consumers == 1 and config.waves == 1 else _LOADS
        at_once = max(1, min(schedule.most_shares - 1, room // (part_n * rows // 128) - 1))

        def total(half):
            def add(n, out):
                base = 1 + n * at_once
                places = [jnp.minimum(base + j, others) for j in range(at_once)]
                parts = [part_of(owner + i, 0, half) for i in places]
                for j, value in enumerate(parts):  # past the last part, that one is left out
                    used = lax.broadcast_in_dim(base + j <= others, value.shape, [])
                    out = jnp.where(used, out + value, out)
                return out

            turns = divide(others + at_once - 1, at_once)
            return lax.fori_loop(0, turns, add, part_of(owner, 1, half))

        place = g["ticket"].at[pl.ds(me, 1)]
        ticket = mosaic.take_ticket(counter_of(tile), place, interpret=interpret)

        @pl.when(ticket == others)
        def _():
            counter_of(tile)[...] = 0
            store(tile, tuple(total(half) for half in range(halves)))

    def look(tile, expected):
        """Whether the beginning of a tile that ends here is there, and its sums, early if they fit.

        Without waiting: what is not there yet is added by who comes last.
        """

        def read():
            place = g["ticket"].at[pl.ds(me, 1)]
            ticket = mosaic.read_ticket(counter_of(tile), place, interpret=interpret)
            # Loaded before it is known whether they are there.
            return ticket, *(part_of(block - 1, 1, half) for half in range(held))

        def skip():
            return jnp.int32(0), *[jnp.zeros((part_n, rows), jnp.float32)] * held

        ticket, *parts = lax.cond(expected, read, skip)
        return ticket == 1, parts

    def close(tile, sums, parts):
        """Adds the beginning of a tile, which is there, to the end of it."""
        counter_of(tile)[...] = 0
        parts = parts or [part_of(block - 1, 1, half) for half in range(halves)]
        store(tile, tuple(part + mine for part, mine in zip(parts, sums, strict=True)))

    def segment(i, _):
        tile = lax.div(end - 1, steps) - i
        low, high = jnp.maximum(begin, tile * steps), jnp.minimum(end, (tile + 1) * steps)
        first, last = end - high, end - low
        if "residual" in g:  # into the output's place, where it is added to
            here = g["residual"].at[every_row, mine(tile)]
            plgpu.copy_gmem_to_smem(here, y_s.at[me], g["residual_loaded"].at[me])
        look_at, looks = last, None
        if looking:
            at = jnp.maximum(first, last - look_steps)
            expected = schedule.sees(block, tile, at - write_steps)
            look_at = jnp.where(expected, at, last)
            looks = functools.partial(look, tile, expected)
        shape = plgpu.ACC((part_n, rows), jnp.float32)
        run = functools.partial(multiply, first, look_at, last, looks)
        sums, seen = pl.run_scoped(run, *[shape] * halves)
        plgpu.barrier_arrive(empty.at[slot_of(last - 1)])
        if "residual" in g:
            plgpu.barrier_wait(g["residual_loaded"].at[me])
        if schedule.most_shares == 1:
            store(tile, sums)
            return ()
        whole = high - low == steps
        pl.when(whole)(functools.partial(store, tile, sums))
        cut = jnp.logical_not(whole)
        if looking:
            there, parts = seen
            pl.when(there)(functools.partial(close, tile, sums, parts))
            cut &= jnp.logical_not(there)
        pl.when(cut)(functools.partial(share, tile, sums))
        return ()

    def consume():
        mosaic.wait_for_previous(interpret)
        tiles = lax.div(end - 1, steps) - lax.div(begin, steps) + 1
        lax.fori_loop(0, tiles, segment, ())

    pl.when(me < config.consumers)(consume)
    pl.when(me == config.consumers)(produce)


def run(x, w, bias, residual, counters, *, config, gated, k_major, interpret):
    """Launches the kernel; arguments are checked by the caller."""
    rows, halves = padded_rows(x.shape[0]), 1 + gated
    outputs = w.shape[0 if k_major else 1] // halves
    schedule = schedule_of(config, outputs, x.shape[1])
    consumers, stages, part_n = config.consumers, config.stages, config.part_n
    weight_tile = (part_n, config.tile_k) if k_major else (config.tile_k, part_n)
    x_tiled, w_tiled, y_tiled = (
        mosaic.tiled(x.dtype, minor) for minor in (config.tile_k, weight_tile[1], part_n)
    )
    cut = schedule.most_shares > 1
    operands = {"x": x, "w": w, "bias": bias, "residual": residual}
    operands["counters"] = counters if cut else None
    operands = {name: value for name, value in operands.items() if value is not None}
    results = {"y": jax.ShapeDtypeStruct((x.shape[0], outputs), x.dtype)}
    if cut:
        parts = (schedule.blocks, 2, consumers, halves, part_n, rows)
        results["partial"] = jax.ShapeDtypeStruct(parts, jnp.float32)
    ring = (stages, consumers, halves, *weight_tile)
    scratch = {
        "x_s": plgpu.SMEM((config.held_x, rows, config.tile_k), x.dtype, transforms=x_tiled),
        "w_s": plgpu.SMEM(ring, w.dtype, transforms=w_tiled),
        "y_s": plgpu.SMEM((consumers, rows, part_n), x.dtype, transforms=y_tiled),
        "full": plgpu.Barrier(num_arrivals=consumers * halves + 1, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
    }
    if residual is not None:
        scratch["residual_loaded"] = plgpu.Barrier(num_barriers=consumers)
    if cut:
        scratch["ticket"] = plgpu.SMEM((consumers,), jnp.int32)
    out = plgpu.kernel(
        functools.partial(
            _body,
            config=config,
            schedule=schedule,
            names=(*operands, *results, *scratch),
            k_major=k_major,
            interpret=interpret,
        ),
        out_type=tuple(results.values()),
        scratch_types=tuple(scratch.values()),
        grid=(schedule.blocks,),
        grid_names=("block",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=mosaic.WARPGROUP,
        kernel_name="flat_gemm",
        **({} if interpret is None else {"interpret": interpret}),
    )(*operands.values())
    return out[0]
