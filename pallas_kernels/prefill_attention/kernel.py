"""The kernel of prefill attention: FlashAttention-3 (arXiv 2407.08608) over pages, for Hopper.

A block has one warpgroup that loads and two or three that compute 64 query rows each. Keys and
values come tile by tile, from the diagonal backwards, through a ring in shared memory, one TMA a
page. Two overlaps keep the tensor cores busy: a warpgroup issues the scores of the next tile and
the product of the last one with its values before the softmax between them (section 3.2 of the
paper), and the warpgroups take turns at issuing (section 3.1).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu

from pallas_kernels import mosaic
from pallas_kernels.prefill_attention import registers
from pallas_kernels.prefill_attention.config import ROWS, Config
from pallas_kernels.prefill_attention.tiles import ALIGNMENT, FIRST, LAST, POSITION, ROW, SEQUENCE

_MASKED, _FLOOR = -1e30, -1e20
"""Score of a key that is not seen, and the least peak of a row. Between them lies more than any
rounding, so that a row that has seen no key yet gets weights of exactly 0."""
_TURN_BARRIER = 8
"""First of the named barriers for turns; Mosaic itself uses 0 to the number of warpgroups."""


def _turn(offset: int, warpgroups: int, *, wait: bool) -> None:
    """Waits for this warpgroup's turn, or gives the turn to the one `offset` further."""

    @plgpu.inline_mgpu()
    def act(ctx):
        del ctx
        i32 = mgpu.utils.ir.IntegerType.get_signless(32)
        arith = mgpu.utils.arith
        index = mgpu.utils.warpgroup_idx(sync=False)
        index = arith.remui(
            arith.addi(index, mgpu.utils.c(offset, i32)), mgpu.utils.c(warpgroups, i32)
        )
        barrier = arith.addi(index, mgpu.utils.c(_TURN_BARRIER, i32))
        name = "sync" if wait else "arrive"
        mgpu.utils.inline_ptx(f"bar.{name} $0, 256;", barrier, has_side_effects=True)

    act()


def _rows(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(vector, shape, [0])


@functools.partial(
    jax.jit,
    static_argnames=("scale", "window", "soft_cap", "config", "blocks", "interpret"),
)
def attend(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    tiles: jax.Array,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: Config,
    blocks: int,
    interpret: Any,
) -> jax.Array:
    """Attention of the tiles of `tile_map`; q `[T, Hq, D]` with T at least 64.

    `blocks` is how many blocks a persistent kernel has. Every row of a valid tile is written.
    """
    tokens, heads, size = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    group = heads // kv_heads
    slots, table_width = tiles.shape[0] - 1, page_table.shape[1]
    warpgroups, keys, stages = config.warpgroups, config.keys, config.stages
    pages = keys // page_size
    dtype = q.dtype
    together = config.heads_together or heads
    items = heads * slots
    blocks = min(blocks, items) if config.persistent else items
    turns = config.turns and interpret is None and warpgroups > 1
    log2e = math.log2(math.e)
    to_base_2 = scale * log2e if soft_cap is None else soft_cap * log2e

    def weights_of(scores, peak):
        """exp2 of the scores, scaled, below `peak`: one fused multiply-add and one exp2 each."""
        return jnp.exp2(scores * to_base_2 - _rows(peak, scores.shape))

    def masked(scores, base):
        """Scores of keys that a row does not see become `_MASKED`.

        `base` is the position of the first row less that of the first key.
        """
        if interpret is None:
            return registers.mask_scores(scores, base, window=window, masked=_MASKED)
        shape = (ROWS, keys)
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        later = key - row
        seen = later <= base
        if window is not None:
            seen = seen & (later > base - window)
        return jnp.where(seen, scores, _MASKED)

    def capped(scores):
        return scores if soft_cap is None else jnp.tanh(scores * (scale / soft_cap))

    def body(q_g, k_g, v_g, table_g, tiles_g, o_g, *scratch):
        if config.separate_output:
            q_s, o_s, k_s, v_s, *scratch = scratch
        else:
            q_s, k_s, v_s, *scratch = scratch
            o_s = q_s
        q_full, q_free, k_full, k_free, v_full, v_free, *p_s = scratch
        block, wg = lax.axis_index("block"), lax.axis_index("wg")
        mosaic.take_turn(interpret)

        rounds = -(-items // blocks)
        if size <= 128:  # larger heads have no register for it, and go through the unused slots
            rounds = lax.div(heads * tiles_g[slots, 0] + (blocks - 1), blocks)

        def work(turn):
            """Item number `turn` of this block: its tile, head and range of key tiles."""
            # Back and forth: who has the costliest item of one round has the cheapest of the next.
            place = lax.select(lax.rem(turn, 2) == 0, block, blocks - 1 - block)
            item, used = turn * blocks + place, tiles_g[slots, 0]
            real = item < heads * used
            item = jnp.minimum(item, items - 1)
            part = 0
            if together < heads:
                part = lax.div(item, jnp.maximum(used, 1) * together)
                item = item - part * (used * together)
            slot = jnp.minimum(lax.div(item, together), slots - 1)
            head = jnp.minimum(part * together + lax.rem(item, together), heads - 1)
            first = tiles_g[slot, FIRST]
            last = lax.select(real, tiles_g[slot, LAST], 0)
            position = tiles_g[slot, POSITION]
            row = pl.multiple_of(tiles_g[slot, ROW], ALIGNMENT)
            stop = lax.div(position + last + (keys - 1), keys)
            start = jnp.int32(0)
            if window is not None:
                start = lax.div(jnp.maximum(position - (window - 1), 0), keys)
            steps = lax.select(last > 0, stop - start, 0)
            return tiles_g[slot, SEQUENCE], head, row, first, last, position, stop, steps

        @pl.when(wg == warpgroups)
        def _load():
            plgpu.set_max_registers(config.registers(size)[1], action="decrease")

            def load_item(turn, done):
                sequence, head, row, *_, stop, steps = work(turn)
                kv_head = lax.div(head, group)

                def page_ids(tile):
                    first = tile * pages
                    return tuple(
                        table_g[sequence, jnp.clip(first + j, 0, table_width - 1)]
                        for j in range(pages)
                    )

                @pl.when(steps > 0)
                def _():
                    pl.when(done > 0)(lambda: plgpu.barrier_wait(q_free))
                    for w in range(warpgroups):
                        plgpu.copy_gmem_to_smem(
                            q_g.at[pl.ds(row + w * ROWS, ROWS), head], q_s.at[w], q_full
                        )

                    @pl.loop(0, steps)
                    def _(i):
                        # They arrive while the ring is full; the barrier comes after.
                        ids = page_ids(stop - 1 - i)
                        slot = lax.rem(done + i, stages)
                        for source, ring, full, free in (
                            (k_g, k_s, k_full, k_free),
                            (v_g, v_s, v_full, v_free),
                        ):

                            @pl.when(done + i >= stages)
                            def _(free=free):
                                plgpu.barrier_wait(free.at[slot])

                            for j, page in enumerate(ids):
                                plgpu.copy_gmem_to_smem(
                                    source.at[page, :, kv_head],
                                    ring.at[slot, pl.ds(j * page_size, page_size)],
                                    full.at[slot],
                                )

                return done + steps

            done = lax.fori_loop(0, rounds, load_item, jnp.int32(0))
            # Whoever waits on a barrier sees all its phases out.
            pl.when(done > 0)(lambda: plgpu.barrier_wait(q_free))

            @pl.loop(jnp.maximum(done - stages, 0), done)
            def _(i):
                plgpu.barrier_wait(k_free.at[lax.rem(i, stages)])
                plgpu.barrier_wait(v_free.at[lax.rem(i, stages)])

        @pl.when(wg < warpgroups)
        def _compute():
            plgpu.set_max_registers(config.registers(size)[0], action="increase")
            if turns:
                # The first turn is the first warpgroup's.
                pl.when(wg == warpgroups - 1)(lambda: _turn(1, warpgroups, wait=False))

            def store(value, row, first, last, head):
                """Writes the rows `first <= row < last` of value `[64, D]`.

                The others are another tile's.
                """
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                whole = (first == 0) & (last == ROWS)

                @pl.when(whole)
                def _():
                    o_s[wg] = value
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(o_s.at[wg], o_g.at[pl.ds(row, ROWS), head])

                @pl.when(jnp.logical_not(whole) & (first < last))
                def _():
                    if interpret is None:
                        registers.store_rows(value, o_g.at[pl.ds(row, ROWS), head], first, last)
                        return
                    o_s[wg] = value
                    plgpu.commit_smem()

                    @pl.loop(first, last)
                    def _(i):
                        plgpu.copy_smem_to_gmem(
                            o_s.at[wg, pl.ds(i, 1)], o_g.at[pl.ds(row + i, 1), head]
                        )

            def compute_item(turn, carry):
                done, (_, head, row, first, last, position, stop, steps) = carry
                # Read early, needed when this one is through; but larger heads have no registers.
                upcoming = work(turn + 1) if size <= 128 else None
                row = pl.multiple_of(row, ALIGNMENT) + wg * ROWS
                position = position + wg * ROWS
                first = jnp.maximum(first - wg * ROWS, 0)
                last = jnp.minimum(last - wg * ROWS, ROWS)

                def base(i):
                    return position - (stop - 1 - i) * keys

                def wait_for_keys(i):
                    @pl.when(i < steps)
                    def _():
                        plgpu.barrier_wait(k_full.at[lax.rem(done + i, stages)])

                def product(a, b):
                    def multiply(acc):
                        plgpu.wgmma(acc, a, b)
                        return acc[...]

                    shape = (a.shape[0], b.shape[1])
                    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

                def add_values(out, weights, slot):
                    """out + weights @ values. The interpreter knows no wgmma on registers."""
                    if interpret is not None:
                        p_s[0][wg] = weights
                        plgpu.commit_smem()
                        return out + product(p_s[0].at[wg], v_s.at[slot])
                    return pl.run_state(lambda acc: plgpu.wgmma(acc, weights, v_s.at[slot]))(
                        plgpu.ACC.init(out)
                    )

                def softmax_step(scores, total, peak):
                    new_peak = jnp.maximum(peak, scores.max(axis=1) * to_base_2)
                    shrink = jnp.exp2(peak - new_peak)
                    weights = weights_of(scores, new_peak)
                    return weights, total * shrink + weights.sum(axis=1), new_peak, shrink

                def step(i, carry, mask):
                    out, total, peak, weights = carry
                    k_slot, v_slot = lax.rem(done + i, stages), lax.rem(done + i - 1, stages)
                    transposed_keys = k_s.at[k_slot].transpose((1, 0))
                    finish = functools.partial(masked, base=base(i)) if mask else (lambda x: x)

                    if interpret is not None:
                        scores = product(q_s.at[wg], transposed_keys)
                        plgpu.barrier_arrive(k_free.at[k_slot])
                        wait_for_keys(i + 1)
                        plgpu.barrier_wait(v_full.at[v_slot])
                        out = add_values(out, weights, v_slot)
                        plgpu.barrier_arrive(v_free.at[v_slot])
                        weights, total, peak, shrink = softmax_step(
                            finish(capped(scores)), total, peak
                        )
                        return out * _rows(shrink, out.shape), total, peak, weights.astype(dtype)

                    if turns:
                        _turn(0, warpgroups, wait=True)

                    def overlapped(state):
                        out_r, total_r, peak_r, weights_r, shrink_r = state

                        def issue(scores_r):
                            plgpu.wgmma(scores_r, q_s.at[wg], transposed_keys)
                            plgpu.barrier_wait(v_full.at[v_slot])
                            plgpu.wgmma(out_r, weights, v_s.at[v_slot])
                            if turns:
                                _turn(1, warpgroups, wait=False)
                            return plgpu.wgmma_accumulator_load(scores_r, wait_n=1)

                        scores = pl.run_scoped(issue, plgpu.ACC((ROWS, keys), jnp.float32))
                        plgpu.barrier_arrive(k_free.at[k_slot])
                        new, total_r[...], peak_r[...], shrink_r[...] = softmax_step(
                            finish(capped(scores)), total_r[...], peak_r[...]
                        )
                        new = lax.optimization_barrier(new)
                        # The branch also keeps ptxas from waiting for the product with the values
                        # before the softmax, which must run under it.
                        wait_for_keys(i + 1)
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(v_free.at[v_slot])
                        # Only now: the registers of the old weights are free.
                        weights_r[...] = lax.optimization_barrier(new).astype(dtype)

                    out, total, peak, weights, shrink = pl.run_state(overlapped)(
                        (plgpu.ACC.init(out), total, peak, weights, total)
                    )
                    return out * _rows(shrink, out.shape), total, peak, weights

                @pl.when(steps > 0)
                def _():
                    plgpu.barrier_wait(q_full)
                    slot = lax.rem(done, stages)
                    wait_for_keys(0)
                    scores = product(q_s.at[wg], k_s.at[slot].transpose((1, 0)))
                    plgpu.barrier_arrive(k_free.at[slot])
                    scores = masked(capped(scores), base(0))
                    peak = jnp.maximum(scores.max(axis=1), _FLOOR) * to_base_2
                    weights = weights_of(scores, peak)
                    out = plgpu.layout_cast(
                        jnp.zeros((ROWS, size), jnp.float32), plgpu.Layout.WGMMA
                    )
                    carry = out, weights.sum(axis=1), peak, weights.astype(dtype)
                    wait_for_keys(1)

                    # From the diagonal backwards: tiles that some rows see in part, tiles that all
                    # rows see, tiles that the window's edge cuts.
                    seen_by_all = jnp.maximum(lax.div(position + 1, keys), 0)
                    diagonal = jnp.clip(stop - seen_by_all, 1, steps)
                    carry = lax.fori_loop(1, diagonal, functools.partial(step, mask=True), carry)
                    inside = steps
                    if window is not None:
                        unseen = jnp.maximum(position + (ROWS - 1 - window), -1)
                        first_inside = lax.div(unseen + keys, keys)
                        inside = jnp.clip(stop - first_inside, diagonal, steps)
                    carry = lax.fori_loop(
                        diagonal, inside, functools.partial(step, mask=False), carry
                    )
                    if window is not None:
                        carry = lax.fori_loop(
                            inside, steps, functools.partial(step, mask=True), carry
                        )
                    out, total, _, weights = carry
                    if config.separate_output:
                        plgpu.barrier_arrive(q_free)
                    slot = lax.rem(done + steps - 1, stages)
                    plgpu.barrier_wait(v_full.at[slot])
                    out = add_values(out, weights, slot)
                    plgpu.barrier_arrive(v_free.at[slot])
                    out = out * _rows(1.0 / total, out.shape)
                    store(out.astype(dtype), row, first, last, head)
                    if not config.separate_output:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        plgpu.barrier_arrive(q_free)

                @pl.when((steps == 0) & (last > 0))
                def _():
                    zero = plgpu.layout_cast(jnp.zeros((ROWS, size), dtype), plgpu.Layout.WGMMA)
                    store(zero, row, first, last, head)
                    if not config.separate_output:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                return done + steps, upcoming or work(turn + 1)

            lax.fori_loop(0, rounds, compute_item, (jnp.int32(0), work(0)))
            if turns:
                pl.when(wg == 0)(lambda: _turn(0, warpgroups, wait=True))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def shared(*shape):
        return plgpu.SMEM(shape, dtype, transforms=mosaic.tiled(dtype, shape[-1]))

    query = shared(warpgroups, ROWS, size)
    ring = shared(stages, keys, size)
    full = plgpu.Barrier(num_arrivals=pages, num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages)
    scratch = [query, *[query] * config.separate_output, ring, ring]
    scratch += [plgpu.Barrier(num_arrivals=warpgroups)] * 2
    scratch += [full, free, full, free]
    options = {}
    if interpret is not None:
        scratch.append(shared(warpgroups, ROWS, keys))
        options["interpret"] = interpret
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tokens, heads, size), dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        kernel_name="prefill_attention",
        **options,
    )(q, k_pages, v_pages, page_table, tiles)
