"""The decode attention kernel: one launch over paged keys and values.

A block has a producer warpgroup, which walks the block's tiles (`plan.py`) and keeps a ring of K
and V tiles filled by TMA, one copy a page, and a consumer warpgroup, which computes

    S^T[64 tokens, heads] = K Q^T,    P = exp2(S - phi),    O^T[head size, heads] += V^T P

with the query heads of one kv head, padded to 8 or 16, as wgmma's N. Rows that lie in several
blocks meet through a ticket: whoever comes last adds the partial results up in block order.
"""

from __future__ import annotations

import math
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention import plan as plans
from pallas_kernels.decode_attention.config import TILE
from pallas_kernels.decode_attention.spec import Spec
from pallas_kernels.mosaic import store, take_ticket, take_turn, wait_for_previous

LOG2E = math.log2(math.e)
# Rows of numbers_s (one float32 a head) and places in list_s (int32).
L_ROW, M_ROW, PHI_ROW = range(3)
TICKET, NUMBER, FIRST = range(3)
LAZY_STEP = 8.0
"""log2 by which the running maximum must grow before lazy softmax rescales (FlashAttention-4)."""
MOST = 2.0**64
"""Largest safe denominator."""
BY_HEAD = plgpu.Layout.WGMMA.reduce(0)
"""Layout of one number a query head, beside [tokens or head size, heads] in WGMMA layout."""


def across(value: Any, shape: tuple[int, ...]) -> Any:
    """One number a head, for every row of a [_, heads] array."""
    return lax.broadcast_in_dim(value, shape, [1])


def across_all(value: Any, shape: tuple[int, ...]) -> Any:
    """One number, everywhere."""
    return lax.broadcast_in_dim(value, shape, [])


def by_head(size: int, value: float) -> Any:
    return plgpu.layout_cast(jnp.full((size,), value, jnp.float32), BY_HEAD)


class Body:
    """The kernel body: `spec` is static, `refs` what the kernel was given."""

    def __init__(self, spec: Spec, refs: dict[str, Any], interpret: Any) -> None:
        self.spec = spec
        self.refs = refs
        self.interpret = interpret
        self.block = lax.axis_index("block")
        self.head = lax.axis_index("head")
        self.kv_heads = refs["k"].shape[2]
        self.dtype = jnp.dtype(spec.dtype)
        self.pages_per_tile = TILE // spec.page_size

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["refs"][name]
        except KeyError:
            raise AttributeError(name) from None

    def run(self) -> None:
        warpgroup = lax.axis_index("warpgroup")
        if not self.spec.early:
            take_turn(self.interpret)

        @pl.when(warpgroup == 0)
        def _() -> None:
            if self.spec.early:
                take_turn(self.interpret)
            self.consume()

        # Its first loads come before its wait, if it is early; it writes nothing to GMEM.
        pl.when(warpgroup == 1)(self.produce)

    def walk(self, visit: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
        return plans.walk(
            visit,
            state,
            block=self.block,
            blocks=self.spec.blocks,
            lengths=self.lengths,
            ends=self.ends,
            starts=self.starts,
            window=self.spec.window,
            min_tiles=self.spec.config.min_tiles,
        )

    # --- loads -------------------------------------------------------------------------------

    def page_ids(self, row: Any, length: Any, tile: Any) -> list[Any]:
        """Pages of a tile; past the row's end its last page again, which costs no DRAM read.

        Masked tokens need values, because 0 times an unwritten NaN would be NaN.
        """
        last = lax.div(length - 1, jnp.int32(self.spec.page_size))
        first = tile * self.pages_per_tile
        return [self.table[row, jnp.minimum(first + j, last)] for j in range(self.pages_per_tile)]

    def copy_pages(self, pool: Any, ids: list[Any], slot: Any, barrier: Any) -> None:
        size = self.spec.page_size
        for j, page in enumerate(ids):
            plgpu.copy_gmem_to_smem(
                pool.at[page, :, self.head, pl.ds(0, self.spec.columns)],
                self.ring.at[slot, pl.ds(j * size, size)],
                barrier,
            )

    def copy_queries(self, row: Any, slot: Any, barrier: Any) -> None:
        group = self.spec.group
        plgpu.copy_gmem_to_smem(
            self.q.at[row, pl.ds(self.head * group, group), pl.ds(0, self.spec.columns)],
            self.q_raw.at[slot, pl.ds(0, group)],
            barrier,
        )

    def lay_out_queries(self, slot: Any) -> None:
        """q_raw (rows as TMA brings them, from any head on) to q_s (tiled, for wgmma)."""
        q = plgpu.load(
            self.q_raw.at[slot].transpose((1, 0)),
            layout=plgpu.Layout.WGMMA_TRANSPOSED,
            optimized=False,
        )
        self.q_s.transpose((1, 0))[...] = q
        plgpu.commit_smem()

    def produce(self) -> None:
        buffers = self.spec.config.buffers

        def visit(segment: plans.Segment, state: tuple[Any, ...]) -> tuple[Any, ...]:
            unit, visited = state
            slot = lax.rem(visited, 2)

            @pl.when(visited >= 2)
            def _() -> None:
                plgpu.barrier_wait(self.q_empty.at[slot])

            def tile_step(tile: Any, unit: Any) -> Any:
                # Before the wait below, so that the wait hides the table's latency.
                ids = self.page_ids(segment.row, segment.length, tile)
                for pool in (self.k, self.v):
                    slot = lax.rem(unit, buffers)

                    @pl.when(unit >= buffers)
                    def _(slot: Any = slot) -> None:
                        plgpu.barrier_wait(self.empty.at[slot])

                    self.copy_pages(pool, ids, slot, self.full.at[slot])
                    unit = unit + 1
                return unit

            begin = segment.begin
            if self.spec.early:
                begin = jnp.where(visited == 0, self.early_end(segment), begin)
                unit = lax.fori_loop(segment.begin, begin, tile_step, unit)

                @pl.when(visited == 0)
                def _() -> None:
                    wait_for_previous(self.interpret)

            self.copy_queries(segment.row, slot, self.q_full.at[slot])
            unit = lax.fori_loop(begin, segment.end, tile_step, unit)
            return unit, visited + 1

        unit, visited = self.walk(visit, (jnp.int32(0), jnp.int32(0)))
        # Every phase of a barrier must have been waited for when the block ends.
        for barriers, number, used in ((self.empty, buffers, unit), (self.q_empty, 2, visited)):
            for i in range(number):

                @pl.when(used > i)
                def _(barrier: Any = barriers.at[i]) -> None:
                    plgpu.barrier_wait(barrier)

    def early_end(self, segment: plans.Segment) -> Any:
        """Where the tiles of a block's first segment end that are loaded before the wait.

        These fit the ring, and are not the one with the row's newest token, which the kernel ahead
        may be writing.
        """
        newest = lax.div(jnp.maximum(segment.length - 1, 0), jnp.int32(TILE))
        most = jnp.minimum(segment.end, segment.begin + self.spec.config.buffers // 2)
        return jnp.maximum(jnp.minimum(most, newest), segment.begin)

    # --- arithmetic --------------------------------------------------------------------------

    def scores(self, slot: Any, tile: Any, length: Any) -> tuple[Any, Any]:
        """Scores of a tile in log2 units, [64 tokens, heads], and which of them count."""
        spec = self.spec
        shape = (TILE, spec.rows)

        def product(acc: Any) -> Any:
            plgpu.wgmma(acc, self.ring.at[slot], self.q_s.transpose((1, 0)))
            return acc[...]

        s = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
        if spec.soft_cap is None:
            s = s * (spec.scale * LOG2E)
        else:
            # cap tanh(x / cap) = cap - 2 cap / (e^(2 x / cap) + 1), good to 1e-7 cap.
            cap = spec.soft_cap * LOG2E
            e = jnp.exp2(s * (2 * spec.scale * LOG2E / spec.soft_cap))
            s = cap - (2 * cap) / (e + 1.0)
        token = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        token = token + tile * TILE
        seen = token < length
        if spec.window is not None:
            seen = seen & (token >= length - spec.window)
        return s, seen

    def put_p(self, p: Any) -> None:
        p = plgpu.layout_cast(p, plgpu.Layout.WGMMA_TRANSPOSED)
        self.p_s.transpose((1, 0))[...] = p
        plgpu.commit_smem()

    def add_pv(self, acc: Any, slot: Any) -> None:
        plgpu.wgmma(acc, self.ring.at[slot].transpose((1, 0)), self.p_s.transpose((1, 0)))

    def unified(self) -> Any:
        """phi in log2 units: a number, or one a head."""
        if self.spec.phi is not None:
            return self.spec.phi * LOG2E
        phi = plgpu.load(self.numbers_s.at[PHI_ROW], layout=BY_HEAD)
        return across(phi, (TILE, self.spec.rows))

    def online(self, s: Any, m: Any, lazy: bool) -> tuple[Any, Any, Any]:
        """Synchronized softmax: the new maximum, what to scale O and l by, and P."""
        top = s.max(axis=0)
        new = jnp.where(top > m + LAZY_STEP, top, m) if lazy else jnp.maximum(m, top)
        return new, jnp.exp2(m - new), jnp.exp2(s - across(new, s.shape))

    def synchronized_step(
        self, k_slot: Any, v_slot: Any, v_ready: Any, tile: Any, length: Any, state: Any, lazy: bool
    ) -> Any:
        """One tile of softmax with a running maximum; state is O^T, l per token, m."""
        o, l, m = state  # noqa: E741
        s, seen = self.scores(k_slot, tile, length)
        m, alpha, p = self.online(jnp.where(seen, s, -jnp.inf), m, lazy)
        self.put_p(p.astype(self.dtype))
        v_ready()

        def product(acc: Any) -> Any:
            self.add_pv(acc, v_slot)
            return acc[...]

        part = pl.run_scoped(product, plgpu.ACC(o.shape, jnp.float32))
        return o * across(alpha, o.shape) + part, l * across(alpha, l.shape) + p, m

    def fresh(self) -> tuple[Any, Any, Any]:
        """O^T, l by token and head, m: nothing seen."""
        spec = self.spec

        def zeros(rows: int) -> Any:
            value = jnp.zeros((rows, spec.rows), jnp.float32)
            return plgpu.layout_cast(value, plgpu.Layout.WGMMA)

        return zeros(spec.columns), zeros(TILE), by_head(spec.rows, -jnp.inf)

    # --- a block's segments --------------------------------------------------------------------

    def consume(self) -> None:
        spec = self.spec
        asynchronous = spec.softmax == "async"
        if asynchronous:
            self.list_s[NUMBER] = jnp.int32(0)
            if spec.phi is None:
                for g in range(spec.rows):
                    index = self.head * spec.group + min(g, spec.group - 1)
                    self.numbers_s[PHI_ROW, g] = self.phi[index] * LOG2E
            plgpu.commit_smem()

        def visit(segment: plans.Segment, state: tuple[Any, ...]) -> tuple[Any, ...]:
            unit, visited = state
            slot = lax.rem(visited, 2)
            plgpu.barrier_wait(self.q_full.at[slot])
            self.lay_out_queries(slot)
            plgpu.barrier_arrive(self.q_empty.at[slot])
            attend = self.attend_async if asynchronous else self.attend_sync
            o, l, m, unit = attend(segment, unit)  # noqa: E741
            l = l.sum(axis=0)  # noqa: E741
            pl.when(segment.whole)(lambda: self.finish(segment, o, l, m))
            pl.when(~segment.whole)(lambda: self.share(segment, o, l, m))
            return unit, visited + 1

        self.walk(visit, (jnp.int32(0), jnp.int32(0)))
        if asynchronous:
            self.recompute_bad()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def slots(self, unit: Any) -> tuple[Any, Any]:
        buffers = self.spec.config.buffers
        return lax.rem(unit, buffers), lax.rem(unit + 1, buffers)

    def attend_async(self, segment: plans.Segment, unit: Any) -> tuple[Any, ...]:
        """O^T and l by plain sums: neither waits for a maximum, nothing is rescaled."""
        spec = self.spec
        phi = self.unified()

        def scope(acc: Any) -> tuple[Any, ...]:
            def step(tile: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
                unit, l = state  # noqa: E741
                k_slot, v_slot = self.slots(unit)
                plgpu.barrier_wait(self.full.at[k_slot])
                s, seen = self.scores(k_slot, tile, segment.length)
                plgpu.barrier_arrive(self.empty.at[k_slot])
                p = jnp.where(seen, jnp.exp2(s - phi), 0.0)
                narrow = p.astype(self.dtype)
                self.put_p(narrow)
                plgpu.barrier_wait(self.full.at[v_slot])
                self.add_pv(acc, v_slot)
                # In fp16 the denominator sums what the product sees: P that overflowed makes it
                # infinite, so that the guard needs no look at O.
                l = l + (narrow.astype(jnp.float32) if spec.dtype == "float16" else p)  # noqa: E741
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(self.empty.at[v_slot])
                return unit + 2, l

            _, l, _ = self.fresh()  # noqa: E741
            unit_, l = lax.fori_loop(segment.begin, segment.end, step, (unit, l))  # noqa: E741
            return acc[...], l, unit_

        acc = plgpu.ACC((spec.columns, spec.rows), jnp.float32)
        o, l, unit = pl.run_scoped(scope, acc)  # noqa: E741
        return o, l, None, unit

    def attend_sync(self, segment: plans.Segment, unit: Any) -> tuple[Any, ...]:
        """O^T, l and m by softmax with a running maximum."""

        def step(tile: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
            unit, *carry = state
            k_slot, v_slot = self.slots(unit)
            plgpu.barrier_wait(self.full.at[k_slot])

            def v_ready() -> None:
                plgpu.barrier_arrive(self.empty.at[k_slot])
                plgpu.barrier_wait(self.full.at[v_slot])

            carry = self.synchronized_step(
                k_slot, v_slot, v_ready, tile, segment.length, carry, self.spec.softmax == "lazy"
            )
            plgpu.barrier_arrive(self.empty.at[v_slot])
            return (unit + 2, *carry)

        state = (unit, *self.fresh())
        unit, o, l, m = lax.fori_loop(segment.begin, segment.end, step, state)  # noqa: E741
        return o, l, m, unit

    # --- meeting -------------------------------------------------------------------------------

    def share(self, segment: plans.Segment, o: Any, l: Any, m: Any) -> None:  # noqa: E741
        """Leaves a partial result; the last block of the row adds them up and finishes it."""
        place = (self.block, 1 - segment.continues, self.head)
        store(self.part_o.at[place], o)
        store(self.part_l.at[place], l)
        if m is not None:
            store(self.part_m.at[place], m)
        counter = self.counters.at[segment.first_block * self.kv_heads + self.head]
        ticket = take_ticket(counter, self.list_s.at[pl.ds(TICKET, 1)], interpret=self.interpret)

        @pl.when(ticket == segment.last_block - segment.first_block)
        def last() -> None:
            counter[...] = jnp.int32(0)
            self.finish(segment, *self.merge(segment))

    def merge(self, segment: plans.Segment) -> tuple[Any, Any, Any]:
        """Sum of a row's partial results, in block order; several loads are in flight."""
        spec = self.spec
        width = spec.config.merge
        synchronized = spec.softmax != "async"

        def load(base: Any, j: int, slot: int = 0) -> tuple[Any, ...]:
            # Constant distances from one address: one register for all of a round's loads.
            place = (base + j, slot, self.head)
            o = plgpu.load(self.part_o.at[place], layout=plgpu.Layout.WGMMA, optimized=False)
            l = plgpu.load(self.part_l.at[place], layout=BY_HEAD, optimized=False)  # noqa: E741
            if not synchronized:
                return o, l, None
            return o, l, plgpu.load(self.part_m.at[place], layout=BY_HEAD, optimized=False)

        def step(n: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
            base = segment.first_block + 1 + n * width
            parts = [load(base, j) for j in range(width)]
            o, l, *rest = state  # noqa: E741
            for j, (part_o, part_l, part_m) in enumerate(parts):
                # Past the last block lies what may be anything, and counts nothing.
                exists = base + j <= segment.last_block
                part_o = jnp.where(across_all(exists, part_o.shape), part_o, 0.0)
                part_l = jnp.where(across_all(exists, part_l.shape), part_l, 0.0)
                if synchronized:
                    (m,) = rest
                    part_m = jnp.where(across_all(exists, part_m.shape), part_m, -jnp.inf)
                    top = jnp.maximum(m, part_m)
                    old, new = jnp.exp2(m - top), jnp.exp2(part_m - top)
                    o = o * across(old, o.shape) + part_o * across(new, o.shape)
                    l = l * old + part_l * new  # noqa: E741
                    rest = [top]
                else:
                    o = o + part_o
                    l = l + part_l  # noqa: E741
            return (o, l, *rest)

        o, l, m = load(segment.first_block, 0, 1)  # noqa: E741
        state = (o, l, *((m,) if synchronized else ()))
        others = segment.last_block - segment.first_block
        steps = lax.div(others + (width - 1), jnp.int32(width))
        o, l, *rest = lax.fori_loop(0, steps, step, state)  # noqa: E741
        return o, l, (rest[0] if rest else None)

    def finish(self, segment: plans.Segment, o: Any, l: Any, m: Any) -> None:  # noqa: E741
        """Checks the sums of a whole row and writes its output, or notes it as bad."""
        spec = self.spec
        self.write(segment.row, o, l, m)
        if spec.softmax != "async":
            self.recomputed[segment.row, self.head] = jnp.int32(0)
            return
        least, each = spec.least
        if each:
            tokens = segment.length
            if spec.window is not None:
                tokens = jnp.minimum(tokens, spec.window)
            least = least * tokens.astype(jnp.float32)
        safe = jnp.bool_(True)
        for g in range(spec.group):  # NaN is not safe
            safe = safe & (self.numbers_s[L_ROW, g] >= least) & (self.numbers_s[L_ROW, g] <= MOST)
        bad = (segment.length > 0) & ~safe
        self.recomputed[segment.row, self.head] = bad.astype(jnp.int32)

        @pl.when(bad)
        def _() -> None:
            number = self.list_s[NUMBER]
            plgpu.commit_smem()  # every thread has read the number
            self.list_s[NUMBER] = number + 1
            self.list_s[FIRST + number] = segment.row
            plgpu.commit_smem()

    def write(self, row: Any, o: Any, l: Any, m: Any) -> None:  # noqa: E741
        """O / l and, if wanted, lse, to their places."""
        spec = self.spec
        group = spec.group
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # o_s is free again
        inverse = jnp.where(l == 0, 0.0, 1.0 / l)
        value = (o * across(inverse, o.shape)).astype(self.dtype)
        self.o_s.transpose((1, 0))[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
        self.numbers_s[L_ROW] = l
        if m is not None:
            self.numbers_s[M_ROW] = m
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            self.o_s.at[pl.ds(0, group)],
            self.out.at[row, pl.ds(self.head * group, group), pl.ds(0, spec.columns)],
        )
        if spec.return_lse:
            for g in range(group):
                if m is not None:
                    base = self.numbers_s[M_ROW, g] / LOG2E
                elif spec.phi is None:
                    base = self.numbers_s[PHI_ROW, g] / LOG2E
                else:
                    base = spec.phi
                self.lse[row, self.head * group + g] = base + jnp.log(self.numbers_s[L_ROW, g])

    # --- recomputation ---------------------------------------------------------------------------

    def recompute_bad(self) -> None:
        """Bad rows again, with synchronized softmax, when the ring is idle."""
        plgpu.commit_smem()
        # What was stored of a bad row must be complete before its place is written again.
        bad = self.list_s[NUMBER] > 0
        pl.when(bad)(lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=False))

        def step(i: Any, _: None) -> None:
            self.recompute(self.list_s[FIRST + i])

        lax.fori_loop(0, self.list_s[NUMBER], step, None)

    def recompute(self, row: Any) -> None:
        spec = self.spec
        length = self.lengths[row]
        depth = spec.config.buffers // 2
        begin = plans.first_tile(length, spec.window)
        end = lax.div(length + (TILE - 1), jnp.int32(TILE))

        def fetch(tile: Any) -> None:
            @pl.when(tile < end)
            def _() -> None:
                slot = lax.rem(tile - begin, depth)
                ids = self.page_ids(row, length, tile)
                self.copy_pages(self.k, ids, 2 * slot, self.again.at[slot])
                self.copy_pages(self.v, ids, 2 * slot + 1, self.again.at[slot])

        self.copy_queries(row, 0, self.q_again)
        for j in range(depth):
            fetch(begin + j)
        plgpu.barrier_wait(self.q_again)
        self.lay_out_queries(0)

        def step(tile: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
            slot = lax.rem(tile - begin, depth)
            plgpu.barrier_wait(self.again.at[slot])
            state = self.synchronized_step(
                2 * slot, 2 * slot + 1, lambda: None, tile, length, state, False
            )
            fetch(tile + depth)
            return state

        o, l, m = lax.fori_loop(begin, end, step, self.fresh())  # noqa: E741
        self.write(row, o, l.sum(axis=0), m)
